"""The shipped configuration for the experts alone, from the command line, and rates by part."""

import json
from pathlib import Path

import pytest
import torch
from support import runs
from support.training import config, train_steps

from moe_llm.cli import main
from moe_llm.config import load_config
from moe_llm.config.load import validate
from moe_llm.families.hf import is_expert, is_router
from moe_llm.finetune.diff import diff
from moe_llm.finetune.init_from import complete

SHIPPED = Path(__file__).parents[2] / "configs/finetune/experts_only.yaml"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("corpus") / "text.txt")


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
    """A checkpoint of two steps, in fp32."""
    return runs.trained(text, tmp_path_factory.mktemp("base"), steps=2)


def overrides(base, text, tmp_path) -> list[str]:
    return [
        f"model.init_from={base}",
        f"data.sources.0.path={text}",
        "data.sources.0.document=line",
        f"data.cache_dir={base.parents[2] / 'cache'}",
        "data.sequence_length=32",
        "train.max_steps=3",
        f"run.dir={tmp_path / 'run'}",
        "evaluate.max_blocks=2",
        "optim.warmup_steps=0",
        "checkpoint.every_steps=2",
        "train.device=cpu",
        "checkpoint.async=true",
    ]


def test_experts_alone_are_trained_from_the_command_line_and_on_resuming(base, text, tmp_path, capsys):
    """Trained and exported in bf16, by a save in the background; frozen tensors stay in the base's fp32."""
    command = ["train", str(SHIPPED), *overrides(base, text, tmp_path)]
    assert main([*command, "train.max_steps=2"]) == 0
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "training experts (6,144): 6,144 of " in told
    assert "resuming from" in told
    saved = tmp_path / "run/checkpoints/latest"
    for row in diff(base, saved):
        assert row["same_bytes"] == (0 if row["part"] == "experts" else row["matrices"]), row
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (saved / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((saved / "config.json").read_text())["num_local_experts"] == 4


def test_the_shipped_file_survives_a_dump(base):
    loaded = load_config(SHIPPED, [f"model.init_from={base}", "data.sequence_length=64"], complete)
    assert validate(loaded.model_dump(mode="json")) == loaded
    assert (loaded.finetune.trainable, loaded.model.hidden_size, loaded.tokenizer.path) == ("experts", 16, str(base))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["finetune.trainable=[no.such.*]"], "finetune.trainable='no.such.*' matches no parameter"),
        (["finetune.experts=[9]"], "names expert 9"),
        (["model.init_from=/nowhere"], "model.init_from='/nowhere' does not exist"),
        (["model.hidden_size=8"], "model.hidden_size=8 contradicts"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(base, text, tmp_path, capsys, words, sentence):
    assert main(["train", str(SHIPPED), *overrides(base, text, tmp_path), *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert sentence in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("experts", [None, [0, 3]])
def test_each_part_has_its_own_rate(experts):
    """Under SGD without a bound, the first change of a weight is its rate times the gradient and the decay."""
    optim = {"grad_clip": 0.0, "weight_decay": 0.5, "lr": 0.1, "schedule": "constant"}
    times = {"router": 0.5, "experts": 3.0, "rest": 0.25}
    plain, scaled = (
        config(4, 1, 1, finetune={"experts": experts}, optim=optim | more) for more in ({}, {"lr_multipliers": times})
    )
    start = train_steps(plain, 0)["weights"]
    one, other = train_steps(plain, 1)["weights"], train_steps(scaled, 1)["weights"]
    for name, (_, before) in start.items():
        rate = times["experts" if is_expert(name) else "router" if is_router(name) else "rest"]
        change, expected = other[name][1] - before, rate * (one[name][1] - before)
        assert expected.any()
        assert torch.allclose(change, expected, atol=1e-6), name

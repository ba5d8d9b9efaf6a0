"""The shipped configuration for low-rank adapters, from the command line; what is refused, and what doctor says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from support import runs
from support.training import MODEL, config

from moe_llm.cli import main
from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.families.hf import parameter_shapes
from moe_llm.finetune.diff import diff
from moe_llm.finetune.selection import describe, trained_names
from moe_llm.finetune.targets import check_lora

SHIPPED = Path(__file__).parents[2] / "configs/finetune/lora.yaml"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("corpus") / "text.txt")


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
    return runs.trained(text, tmp_path_factory.mktemp("base"), steps=1)


def command(base, text, tmp_path, *more: str) -> list[str]:
    return [
        "train",
        str(SHIPPED),
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
        "checkpoint.async=true",
        "train.device=cpu",
        "finetune.lora.rank=2",
        *more,
    ]


def test_adapters_are_trained_from_the_command_line_and_on_resuming(base, text, tmp_path, capsys):
    """In bf16 with dropout, saved in the background; transformers loads what comes of it."""
    assert main(command(base, text, tmp_path, "train.max_steps=2")) == 0
    assert main(command(base, text, tmp_path)) == 0
    told = capsys.readouterr().err
    assert "training adapters of rank 2, times 8, of attention (" in told
    assert "resuming from" in told
    saved = tmp_path / "run/checkpoints/latest"
    for row in diff(base, saved):
        changed = row["part"] in ("attention", "experts")
        assert row["same_bytes"] == (0 if changed else row["matrices"]), row
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["finetune.lora.rank=0"], "finetune.lora.rank=0"),
        (["finetune.lora.rank=17"], "finetune.lora.rank=17 is more than the "),
        (
            ["finetune.lora.targets=[no.such.*]"],
            "finetune.lora.targets='no.such.*' is no part of the model and matches no",
        ),
        (["finetune.lora.targets=[lm_head.*]"], "matches lm_head.weight, for which there are no adapters"),
        (
            ["finetune.lora.targets=[router]", "finetune.router_guard.action=freeze"],
            "contradicts finetune.lora.targets",
        ),
        (["finetune.lora.dropout=1"], "finetune.lora.dropout=1"),
        (["finetune.lora.rank=null"], "applies to nothing without a rank"),
        (["finetune.trainable=experts"], "finetune.trainable=experts names whole tensors to train beside lora.rank=2"),
        (["finetune.experts=[1]"], "names whole tensors to train beside lora.rank=2"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(base, text, tmp_path, capsys, words, sentence):
    assert main(command(base, text, tmp_path, *words)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert sentence in told
    assert not (tmp_path / "run").exists()


def adapted(**lora):
    return config(1, 1, 1, finetune={"lora": {"rank": 2, **lora}})


def test_without_a_base_or_without_peft_it_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"finetune\.lora\.rank=2 has no base to adapt: set model\.init_from"):
        check_lora(adapted())
    with_base = config(1, 1, 1, model={**MODEL, "init_from": "somewhere"}, finetune={"lora": {"rank": 2}})
    check_lora(with_base)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"targets=\['attention'\] needs the package peft .*: pip install peft"):
        check_lora(with_base)
    check_lora(
        config(
            1, 1, 1, model={**MODEL, "init_from": "somewhere"}, finetune={"lora": {"rank": 2, "targets": ["experts"]}}
        )
    )


def test_the_sentence_counts_the_factors():
    shapes = parameter_shapes(ModelConfig(**MODEL))
    expected = sum(2 * (shape[0] + shape[1]) for name, shape in shapes.items() if ".self_attn." in name)
    assert f"training adapters of rank 2, times 2, of attention ({expected:,}): " in describe(adapted())
    names = trained_names(adapted(targets=["*.1.mlp.experts.down_proj"]))
    assert names == [f"model.layers.1.mlp.experts.down_proj_lora_{factor}" for factor in "AB"]

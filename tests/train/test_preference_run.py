"""Preference tuning in whole runs: against TRL step by step, over layouts, resumed, with most of the model frozen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import runs
from support.ranks import fresh_accelerate
from support.training import difference

from moe_llm.cli import main


@pytest.fixture(scope="module")
def base(finished_run):
    return finished_run / "checkpoints/step-00000006"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def answers(seed: int) -> list[dict]:
    words = ["abcd", "efg", "hijk", "lmn", "opab"]
    return [
        {
            "prompt": " ".join(words[(seed + i + j) % 5] for j in range(2 + i % 3)),
            "chosen": " " + " ".join(words[(seed + 2 * i + j) % 5] for j in range(1 + i % 4)),
            "rejected": " " + " ".join(words[(seed + 3 * i + 1 + j) % 5] for j in range(1 + (i + 2) % 3)),
        }
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for name, seed in (("train", 0), ("held_out", 7)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers(seed)))
    return folder


@pytest.fixture
def settings(base, pairs, cache, tmp_path):
    """Path of a preference run's YAML file."""

    def make(name: str = "run", **changes):
        source = {"type": "files", "content": "preference"}
        sections = {
            "model": {"init_from": str(base), "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0},
            "data": {
                "sources": [{**source, "path": str(pairs / "train.jsonl")}],
                "validation_sources": [{**source, "path": str(pairs / "held_out.jsonl")}],
                "sequence_length": 64,
            },
            "optim": {"lr": 3e-3, "schedule": "constant", "weight_decay": 0.0, "betas": [0.9, 0.999]},
            "train": {
                "max_steps": 3,
                "micro_batch_size": 1,
                "global_batch_size": 2,
                "precision": "fp32",
                "device": "cpu",
            },
            "evaluate": {"every_steps": 1},
            "checkpoint": {"every_steps": 2},
        }
        for section, values in changes.items():
            sections[section] = sections.get(section, {}) | values
        raw = runs.sections(pairs / "train.jsonl", cache, tmp_path / name, **sections)
        raw["model"] = sections["model"]
        raw["data"].pop("validation_fraction")
        return runs.write_yaml(tmp_path / f"{name}.yaml", raw)

    return make


def test_the_first_loss_is_that_of_a_model_that_equals_its_reference(settings, tmp_path):
    assert main(["train", str(settings())]) == 0
    first, *_, last = runs.records(tmp_path / "run")
    assert first["preference_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert first["margin"] == pytest.approx(0, abs=1e-3)
    assert {"val_loss", "val_accuracy", "val_margin", "accuracy", "chosen_logp"} <= last.keys()
    assert (tmp_path / "run/reference.safetensors").is_file()


@pytest.mark.parametrize(
    "loss",
    [
        "dpo",
        "dpo_norm",
        {"loss": "ipo", "beta": 0.5},
        {"loss": "simpo", "beta": 2.0, "gamma": 0.5},
        {"loss": "orpo", "beta": 0.5},
    ],
)
def test_each_loss_puts_the_chosen_answers_ahead(settings, tmp_path, loss):
    preference = {"loss": loss} if isinstance(loss, str) else loss
    path = settings(preference=preference, checkpoint={"every_steps": None}, evaluate={"every_steps": None})
    assert main(["train", str(path), "train.max_steps=12", "optim.lr=5e-3"]) == 0
    records = runs.records(tmp_path / "run")
    for name, better in (("loss", -1), ("margin", 1)):
        first, last = (sum(record[name] for record in part) for part in (records[:3], records[-3:]))
        assert (last - first) * better > 0, name


def test_a_resumed_run_equals_an_uninterrupted_one_and_keeps_its_reference(settings, tmp_path):
    assert main(["train", str(settings("whole"))]) == 0
    assert main(["train", str(settings("cut")), "train.max_steps=2"]) == 0
    kept = (tmp_path / "cut/reference.safetensors").read_bytes()
    assert main(["train", str(settings("cut"))]) == 0
    assert (tmp_path / "cut/reference.safetensors").read_bytes() == kept
    assert runs.timeless(tmp_path / "cut") == runs.timeless(tmp_path / "whole")
    (tmp_path / "cut/reference.safetensors").unlink()  # made again from the base, not from the trained weights
    assert main(["train", str(settings("cut")), "train.max_steps=4"]) == 0
    assert (tmp_path / "cut/reference.safetensors").read_bytes() == kept


def test_a_reference_of_another_base_is_not_used_at_a_new_start(settings, tmp_path, finished_run, base):
    """A start that was ended before its first checkpoint leaves the reference of the base that it had."""
    other = finished_run / "checkpoints/step-00000003"
    assert main(["train", str(settings("fresh", preference={"loss": "ipo"})), "train.max_steps=1"]) == 0
    left = settings("left", preference={"loss": "ipo"}, model={"init_from": str(other)})
    assert main(["train", str(left), "train.max_steps=1"]) == 0
    stale = (tmp_path / "left/reference.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "left")
    (tmp_path / "left").mkdir()
    (tmp_path / "left/reference.safetensors").write_bytes(stale)
    assert main(["train", str(settings("left", preference={"loss": "ipo"})), "train.max_steps=1"]) == 0
    assert (tmp_path / "left/reference.safetensors").read_bytes() != stale
    assert runs.timeless(tmp_path / "left") == runs.timeless(tmp_path / "fresh")


def test_experts_alone_are_trained_and_the_rest_stays_to_the_byte(settings, tmp_path, base):
    assert main(["train", str(settings(finetune={"trainable": "experts"}))]) == 0
    before, after = weights(base), weights(tmp_path / "run/checkpoints/step-00000003")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".experts." in name for name in changed)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"model": {"init_from": None, "vocab_size": 320}},
            "preference.loss=dpo compares with the model that the run starts",
        ),
        ({"preference": {"gamma": 1.0}}, "preference.gamma=1.0 does not apply to dpo"),
        (
            {"preference": {"loss": "ipo", "label_smoothing": 0.1}},
            "preference.label_smoothing=0.1 does not apply to ipo",
        ),
        ({"data": {"train_on": "last"}}, "data.train_on=last does not apply to preferences"),
        ({"distill": {"teachers": [{"path": "x"}]}, "tokenizer": {"path": "x"}}, "stand beside preferences"),
        (
            {"model": {"router": {"type": "em"}}},
            "model.router.type=em makes each answer's tokens likelier, the rejected",
        ),
        (
            {"model": {"router": {"type": "reinforce"}}},
            "model.router.type=reinforce makes each answer's tokens likelier",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, capsys, changes, why):
    assert main(["train", str(settings(**changes))]) == 2
    assert why in capsys.readouterr().err


def test_two_ranks_with_shared_experts_equal_one_process(settings, tmp_path, two_ranks_of_a_run):
    one = _weights(str(settings("one")))
    two = two_ranks_of_a_run.run(_weights, str(settings("two", parallel={"expert_parallel_size": 2})))
    for name in ("loss", "margin", "accuracy", "grad_norm", "val_loss"):
        expected = [record[name] for record in runs.records(tmp_path / "one")]
        assert [record[name] for record in runs.records(tmp_path / "two")] == pytest.approx(
            expected, rel=2e-4, abs=1e-5
        )
    assert difference(two, one, "weights")[0] < 1e-4


def _weights(path: str) -> dict:
    fresh_accelerate()
    assert main(["train", path]) == 0
    run_dir = Path(yaml.safe_load(Path(path).read_text())["run"]["dir"])
    return {"weights": {name: (None, t) for name, t in weights(run_dir / "checkpoints/step-00000003").items()}}

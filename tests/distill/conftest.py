"""Teachers, each made once, and configurations of students."""

import shutil
from pathlib import Path

import pytest
from support import runs

from moe_llm.cli import main

STEPS = 4


@pytest.fixture(scope="session")
def lessons(tmp_path_factory) -> Path:
    """A text and a cache of tokens that all runs here share."""
    root = tmp_path_factory.mktemp("lessons")
    runs.write_text(root / "text.txt", lines=100)
    return root


@pytest.fixture(scope="session")
def mixtures(lessons) -> list[Path]:
    """Two checkpoints of this package, which know a little of the text."""
    found = []
    for seed in (1, 2):
        raw = runs.sections(
            lessons / "text.txt",
            lessons / "cache",
            lessons / f"teacher-{seed}",
            optim={"lr": 0.02},
            run={"seed": seed},
            train={"max_steps": 8},
            checkpoint={"every_steps": None},
            logging={"console": "off"},
        )
        if found:
            raw["tokenizer"] = {"path": str(found[0])}
        assert main(["train", str(runs.write_yaml(lessons / f"teacher-{seed}.yaml", raw))]) == 0
        found.append(lessons / f"teacher-{seed}/checkpoints/latest")
    return found


@pytest.fixture(scope="session")
def dense(lessons, mixtures) -> Path:
    """A Llama of transformers, of random weights, with the mixtures' tokenizer and 8 logits more than it has tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=runs.MODEL["vocab_size"] + 8,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    )
    return with_tokenizer(model, lessons / "dense", mixtures[0])


def with_tokenizer(model, directory: Path, tokenizer: Path) -> Path:
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, directory / file)
    return directory


@pytest.fixture
def student(lessons, tmp_path):
    """Path of a configuration; sections are merged in."""

    def make(name: str, distill: dict, **changes) -> Path:
        changes = {
            "train": {"max_steps": STEPS},
            "checkpoint": {"every_steps": None},
            "logging": {"console": "off"},
            "optim": {"lr": 3e-3, "schedule": "constant"},
            **changes,
        }
        raw = runs.sections(lessons / "text.txt", tmp_path / "cache", tmp_path / name, **changes)
        return runs.write_yaml(tmp_path / f"{name}.yaml", raw | {"distill": distill})

    return make


@pytest.fixture
def trained(student, tmp_path):
    """Train in this process; the records without what a clock gave."""

    def run(name: str, distill: dict, *words: str, **changes) -> list[dict]:
        assert main(["train", str(student(name, distill, **changes)), *words]) == 0
        return runs.timeless(tmp_path / name)

    return run

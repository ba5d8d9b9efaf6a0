"""`checkpoint.async` in whole runs: training goes on while the disk does not, and nothing else changes."""

import json
import random
import threading

import pytest
import yaml

from moe_llm.checkpoint import safetensors_io
from moe_llm.cli import main
from moe_llm.train.metrics import MetricsFile

STEPS = 8


@pytest.fixture
def make_run(tmp_path):
    draw = random.Random(1)
    words = ["".join(draw.choice("abcdefghij") for _ in range(4)) for _ in range(100)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(draw.choices(words, k=20)) for _ in range(150)))

    def make(name: str, **checkpoint) -> tuple[list[str], object]:
        raw = {
            "run": {"dir": str(tmp_path / name), "seed": 5},
            "model": {
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "num_local_experts": 4,
                "max_position_embeddings": 32,
            },
            "data": {
                "sources": [{"type": "files", "path": str(text), "document": "line"}],
                "sequence_length": 32,
                "validation_fraction": 0.1,
                "cache_dir": str(tmp_path / "cache"),
                "num_workers": 1,
            },
            "train": {
                "max_steps": STEPS,
                "micro_batch_size": 2,
                "global_batch_size": 2,
                "precision": "fp32",
                "device": "cpu",
            },
            "checkpoint": {"every_steps": 2, **checkpoint},
            "evaluate": {"max_blocks": 2},
            "logging": {"console": "off"},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return ["train", str(path)], tmp_path / name

    return make


def losses(run_dir) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_steps_do_not_wait_for_the_disk(make_run, monkeypatch):
    """The save of step 4 writes nothing until step 7 is recorded: a step that waited would never end."""
    recorded, true_record = threading.Event(), MetricsFile.write
    true_write = safetensors_io.ShardWriter.write

    def record(metrics, line):
        true_record(metrics, line)
        if line["step"] == 7:
            recorded.set()

    def write(writer, name, tensor):
        if "step-00000004" in str(writer.path):
            assert recorded.wait(60), "training waits for the disk"
        true_write(writer, name, tensor)

    monkeypatch.setattr(MetricsFile, "write", record)
    monkeypatch.setattr(safetensors_io.ShardWriter, "write", write)
    command, run_dir = make_run("background", every_steps=4, **{"async": True})
    assert main(command) == 0
    found = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert found == ["checkpoints.json", "latest", "step-00000004", "step-00000008"]
    assert (run_dir / "checkpoints/latest").resolve().name == "step-00000008"


def test_only_the_moment_of_writing_differs(make_run):
    """The same checkpoints as those that a run waits for, kept and deleted alike; and resumable."""
    runs = {}
    for name, background in (("waiting", False), ("background", True)):
        command, run_dir = make_run(name, keep_last=2, **{"async": background})
        assert main([*command, "train.max_steps=5"]) == 0
        assert main(command) == 0
        runs[background] = run_dir
    assert losses(runs[True]) == losses(runs[False])
    assert len(losses(runs[True])) == STEPS
    names = sorted(path.name for path in (runs[True] / "checkpoints").iterdir())
    assert names == ["checkpoints.json", "latest", "step-00000006", "step-00000008"]
    for path in (runs[False] / "checkpoints").rglob("*.safetensors"):
        same = runs[True] / path.relative_to(runs[False])
        assert same.read_bytes() == path.read_bytes(), path.name


def test_a_disk_that_fails_in_the_background_ends_the_run_with_one_sentence(make_run, monkeypatch, capsys):
    true_write = safetensors_io.ShardWriter.write

    def write(writer, name, tensor):
        if "step-00000004" in str(writer.path):
            raise OSError(28, "No space left on device")
        true_write(writer, name, tensor)

    monkeypatch.setattr(safetensors_io.ShardWriter, "write", write)
    command, run_dir = make_run("background", **{"async": True})
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("moe-llm: error: no space left for checkpoint")]) == 1
    assert "step-00000004" in error[-1]
    assert len(losses(run_dir)) == 6  # found out at the next save
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "checkpoints.json",
        "latest",
        "step-00000002",
    ]
    monkeypatch.undo()
    assert main(command) == 0
    assert len(losses(run_dir)) == STEPS

"""scripts/experiments/distill.py in miniature, and the shipped configurations with its teachers."""

import json
import sys

import pytest
from support import runs

from moe_llm.cli import main
from moe_llm.config import load_config


@pytest.mark.grid
def test_the_experiment_tells_losses_of_students_and_teachers(lessons, tmp_path):
    raw = runs.sections(lessons / "text.txt", tmp_path / "cache", tmp_path / "unused", logging={"console": "off"})
    config = runs.write_yaml(tmp_path / "config.yaml", raw)
    words = [
        sys.executable,
        str(runs.ROOT / "scripts/experiments/distill.py"),
        "--config",
        str(config),
        "--student",
        str(config),
        "--teachers",
        "2",
        "--teacher-steps",
        "2",
        "--steps",
        "2",
        "--seeds",
        "0",
        "--cached",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
        "optim.lr=0.01",
    ]
    done = runs.finish(words)
    assert done.returncode == 0, done.stderr
    found = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert [row["learns from"] for row in found["students"]] == [
        "text alone",
        "one teacher",
        "ensemble of 2",
        "ensemble of 2, 64 successors",
    ]
    assert len({row["losses"]["0"] for row in found["students"]}) == 4
    assert found["ensemble"] == pytest.approx(sum(found["teachers"]) / 2, rel=0.02)
    assert found["ensemble"] < sum(found["teachers"]) / 2  # Jensen
    assert "The ensemble's student is below the text's by" in next((tmp_path / "out").glob("*.md")).read_text()


@pytest.mark.parametrize("name", ["word_level", "from_ensemble", "sequence_level"])
def test_shipped_configurations_are_read(name, capsys):
    config = load_config(runs.ROOT / f"configs/distill/{name}.yaml")
    assert config.model.num_params() > 0
    assert bool(config.distill.teachers) == (name != "sequence_level")
    if config.distill.teachers:
        assert (
            main(
                [
                    "train",
                    str(runs.ROOT / f"configs/distill/{name}.yaml"),
                    "distill.teachers.0.path=nothing",
                    "run.dir=nowhere",
                    "distill.cache_top_k=null",
                ]
            )
            == 2
        )
        assert "'nothing' does not exist" in capsys.readouterr().err

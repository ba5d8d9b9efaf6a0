"""The fine-tuning benchmark in miniature: both tables come out, and what is frozen has no state."""

import json
import sys
from pathlib import Path

import pytest
from support import runs

from moe_llm.cli import main

SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import finetune

    yield finetune
    sys.modules.pop("finetune")


@pytest.mark.grid
def test_both_tables_come_out(script, tmp_path, monkeypatch):
    text = runs.write_text(tmp_path / "text.txt")
    raw = runs.sections(text, tmp_path / "cache", tmp_path / "base", train={"max_steps": 2}, logging={"console": "off"})
    assert main(["train", str(runs.write_yaml(tmp_path / "base.yaml", raw))]) == 0
    monkeypatch.setattr(script, "PACKAGES", ("pydantic",))
    monkeypatch.setattr(script, "BATCHES", {"small": (2, 1e-2), "large": (4, 1e-3)})
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "finetune.py",
            "--base",
            str(tmp_path / "base/checkpoints/latest"),
            "--tokens",
            "256",
            "--seeds",
            "0",
            "1",
            "--max-bytes",
            "20000",
            "--length",
            "32",
            "--blocks",
            "2",
            "--rounds",
            "2",
            "--work",
            str(tmp_path / "work"),
            "--out",
            str(tmp_path / "out"),
            "--threads",
            "1",
        ],
    )
    script.main()
    [file] = (tmp_path / "out").glob("*.json")
    results = json.loads(file.read_text())
    experts, everything = results["memory"]
    assert experts["optimizer_state_of_frozen"] == everything["optimizer_state_of_frozen"] == 0
    assert everything["optimizer_state"] == 2 * everything["parameters"] == 2 * everything["gradients"]  # fp32
    assert 0 < experts["gradients"] * 2 == experts["optimizer_state"] < everything["optimizer_state"]
    assert [(r["train"], r["recipe"]) for r in results["quality"]] == [
        ("experts", "small"),
        ("experts", "large"),
        ("all", "small"),
        ("all", "large"),
    ]
    for row in results["quality"]:
        assert len({cell["last"] for cell in row["seeds"].values()}) == 2  # a seed decides something
        assert all(cell["last"] > 0 and cell["best"] <= cell["last"] for cell in row["seeds"].values())
    table = file.with_suffix(".md").read_text()
    assert table.count("| `experts` |") == table.count("| `all` |") == 3
    assert "Base: " in table

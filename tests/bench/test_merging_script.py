"""The merging benchmark in miniature: all three tables come out, and what must hold in them does."""

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
    import merging

    yield merging
    sys.modules.pop("merging")


@pytest.mark.grid
def test_all_tables_come_out(script, tmp_path, monkeypatch):
    text = runs.write_text(tmp_path / "text.txt")
    raw = runs.sections(text, tmp_path / "cache", tmp_path / "base", train={"max_steps": 2}, logging={"console": "off"})
    assert main(["train", str(runs.write_yaml(tmp_path / "base.yaml", raw))]) == 0
    monkeypatch.setattr(script, "PACKAGES", ("pydantic",))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "merging.py",
            "--base",
            str(tmp_path / "base/checkpoints/latest"),
            "--tokens",
            "256",
            "--seeds",
            "0",
            "1",
            "--rates",
            "1e-2",
            "--batch",
            "4",
            "--max-bytes",
            "60000",
            "--length",
            "32",
            "--blocks",
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
    soups = {row["what"].partition(":")[0].partition(" of ")[0]: row for row in results["soups"]}
    assert list(soups) == [
        "base",
        "rate 0.01, seed 0",
        "rate 0.01, seed 1",
        "best single",
        "uniform soup",
        "greedy soup",
        "ensemble",
        "student",
    ]
    losses = [soups[f"rate 0.01, seed {seed}"]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    assert soups["best single"]["loss"] in losses
    assert soups["ensemble"]["active_parameters"] == 2 * soups["base"]["active_parameters"] > 0
    assert soups["student"]["loss"] not in losses
    assert soups["student"]["active_parameters"] == soups["base"]["active_parameters"]
    # the mean of distributions is at least as likely as the mean of their logarithms (Jensen)
    assert soups["ensemble"]["loss"] <= sum(losses) / 2 + 1e-6
    tasks = {row["what"]: row for row in results["tasks"]}
    assert tasks["prose negated"]["prose"] > tasks["base"]["prose"] > tasks["tuned on prose"]["prose"]
    assert len({row["prose"] for row in tasks.values()}) == len(tasks) == 10
    base, copy, aligned, naive = results["orders"]
    assert aligned["largest_difference"] == 0 < naive["largest_difference"]
    assert aligned["loss"] == base["loss"]
    assert copy["loss"] == pytest.approx(base["loss"], rel=1e-5)
    assert copy["largest_difference"] > 0
    table = file.with_suffix(".md").read_text()
    assert sum(line.startswith("| ") for line in table.splitlines()) == 8 + 10 + 4 + 3

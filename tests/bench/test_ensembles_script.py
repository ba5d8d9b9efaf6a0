"""The ensembles benchmark in miniature: both tables come out, and they say what the ensembles do."""

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
    import ensembles

    yield ensembles
    for name in ("ensembles", "finetune"):
        sys.modules.pop(name)


def test_both_tables_come_out(script, tmp_path, monkeypatch):
    text = runs.write_text(tmp_path / "text.txt")
    raw = runs.sections(text, tmp_path / "cache", tmp_path / "base", train={"max_steps": 2},
                        logging={"console": "off"})  # fmt: skip
    assert main(["train", str(runs.write_yaml(tmp_path / "base.yaml", raw))]) == 0
    pieces = {"code": ["def f(x):\n    return x\n"], "prose": ["The cat sat on the mat, and slept. "]}
    monkeypatch.setattr(script, "documents", lambda source: iter(pieces[source] * 30))
    monkeypatch.setattr(script, "STRENGTHS", (0.0, 2.0))
    monkeypatch.setattr(sys, "argv", [
        "ensembles.py", "--base", str(tmp_path / "base/checkpoints/latest"), "--tokens", "8000", "--blocks", "4",
        "--samples", "2", "--sample-tokens", "8", "--length", "32", "--max-bytes", "600",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    script.main()
    [file] = (tmp_path / "out").glob("*.json")
    results = json.loads(file.read_text())
    code, prose, uniform, linear, log_linear = results["mixture"]
    assert code["code"] < prose["code"]
    assert prose["prose"] < code["prose"]
    assert uniform["weights"] == [0.5, 0.5]
    assert sum(linear["weights"]) == pytest.approx(1)
    assert linear["both"] < min(code["both"], prose["both"])
    assert log_linear["both"] < min(code["both"], prose["both"])
    by_negative = {(row["negative"], row["lambda"]): row for row in results["negative"]}
    for source in ("code", "prose"):
        # further from the source than the base was, and further than from the other source
        without, base = by_negative[source, 2.0], by_negative[source, 0.0]
        other = {"code": "prose", "prose": "code"}[source]
        assert without[source] - base[source] > without[other] - base[other]
        assert without[source] > base[source]
        assert without["away"] == without["written"]["by_negative"] - without["written"]["by_core"]
    assert file.with_suffix(".md").read_text().count("\n|") == 4 + 5 + 3

"""The table of routers says what the records say."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from support import runs

SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"


@pytest.fixture
def routing(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import routing

    yield routing
    sys.modules.pop("routing")


def records(val_loss: float) -> list[dict]:
    """Eight, of which the last two are the last quarter; two layers."""
    return [
        {
            **({"val_loss": val_loss + 8 - step} if step in (4, 8) else {}),
            "moe": {
                "load_cv": [step / 10, 0.0],
                "dropped_share": [0.5 if step < 7 else 0.25, 0.75],
                "experts_per_token": [2.0, 1.0],
            },
        }
        for step in range(1, 9)
    ]


def rows(routing, **losses: tuple[float, ...]) -> dict[str, dict[str, list[float]]]:
    return {
        name: {
            column: [run[column] for run in map(routing.measured, map(records, found))] for column in routing.COLUMNS
        }
        for name, found in losses.items()
    }


def test_a_run_is_told_by_its_end(routing):
    assert routing.measured(records(3.0)) == pytest.approx(
        {
            "validation loss": 3.0,
            "load variation": (0.7 + 0.8) / 4,
            "dropped share": 0.5,
            "experts a token": 1.5,
        }
    )


def test_the_table_has_means_and_half_ranges_the_best_first(routing):
    found = rows(routing, worse=(4.0, 4.5, 4.1), better=(3.0, 3.0, 3.3))
    head, _, first, second = routing.table(found).splitlines()
    assert head.startswith("| routing | validation loss | load variation |")
    assert first == "| `better` | 3.100 ± 0.150 | 0.375 ± 0.000 | 0.500 ± 0.000 | 1.500 ± 0.000 |"
    assert second.startswith("| `worse` | 4.200 ± 0.250 |")


def test_speeds_are_compared_within_a_round(routing, monkeypatch):
    """A machine that is ten times as slow in the second round changes nothing."""
    by_turn = iter([100.0, 50.0, 10.0, 5.0, 90.0, 63.0])
    monkeypatch.setattr(routing, "speed", lambda file, args: next(by_turn))
    files = [Path("configs/routing/mixtral.yaml"), Path("configs/routing/dense.yaml")]
    ratios = routing.speeds(files, argparse.Namespace(rounds=3))
    assert ratios == {"mixtral": [1, 1, 1], "dense": [0.5, 0.5, 0.7]}
    found = rows(routing, mixtral=(3.0,), dense=(4.0,))
    for name, values in ratios.items():
        found[name][routing.SPEED] = values
    assert [line.split(" | ")[-1] for line in routing.table(found).splitlines()[2:]] == ["1.00 |", "0.50 |"]


@pytest.mark.grid  # whole runs, each a process
def test_runs_and_speeds_come_from_the_command_line(routing, tmp_path, monkeypatch, capsys):
    text = runs.write_text(tmp_path / "text.txt")
    small = runs.sections(text, tmp_path / "cache", tmp_path / "unused", train={"max_steps": 2})
    words = [f"{section}={json.dumps(small[section])}" for section in ("data", "train", "optim")]
    words += [
        "model.hidden_size=16",
        "model.num_attention_heads=2",
        "model.num_hidden_layers=1",
        "model.num_key_value_heads=1",
        "model.vocab_size=300",
        "checkpoint.every_steps=null",
        "evaluate.every_steps=null",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "routing.py",
            "--work",
            str(tmp_path / "work"),
            "--out",
            str(tmp_path / "out"),
            "--seeds",
            "0",
            "--steps",
            "2",
            "--rounds",
            "1",
            "--bench-steps",
            "1",
            "--only",
            "mixtral",
            "top_p",
            "--set",
            *words,
        ],
    )
    routing.main()
    [file] = (tmp_path / "out").glob("*.json")
    found = json.loads(file.read_text())["rows"]
    assert set(found) == {"mixtral", "top_p"}
    assert found["mixtral"][routing.SPEED] == [1.0]
    assert found["top_p"][routing.SPEED][0] > 0
    assert found["mixtral"]["experts a token"] == [2.0]

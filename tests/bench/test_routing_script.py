"""The table of routers says what the records say."""

import sys
from pathlib import Path

import pytest

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
        {"tokens_per_second": 100.0 + step, **({"val_loss": val_loss + 8 - step} if step in (4, 8) else {}),
         "moe": {"load_cv": [step / 10, 0.0], "dropped_share": [0.5 if step < 7 else 0.25, 0.75],
                 "experts_per_token": [2.0, 1.0]}}
        for step in range(1, 9)
    ]


def test_a_run_is_told_by_its_end(routing):
    assert routing.measured(records(3.0)) == pytest.approx({
        "validation loss": 3.0, "load variation": (0.7 + 0.8) / 4, "dropped share": 0.5, "experts a token": 1.5,
        "tokens/s": 104.5,
    })


def test_the_table_has_means_and_half_ranges_the_best_first(routing):
    rows = {
        name: {column: [run[column] for run in map(routing.measured, map(records, losses))]
               for column in routing.COLUMNS}
        for name, losses in {"worse": (4.0, 4.5, 4.1), "better": (3.0, 3.0, 3.3)}.items()
    }
    head, _, first, second = routing.table(rows).splitlines()
    assert head.startswith("| routing | validation loss | load variation |")
    assert first == "| `better` | 3.100 ± 0.150 | 0.375 ± 0.000 | 0.500 ± 0.000 | 1.500 ± 0.000 | 104 ± 0 |"
    assert second.startswith("| `worse` | 4.200 ± 0.250 |")

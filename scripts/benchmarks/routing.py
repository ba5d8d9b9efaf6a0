"""Every way to route on the quickstart's data, at equal active parameters and tokens: one table.

    python scripts/benchmarks/routing.py --out runs/routing      # configs/routing/*.yaml and the dense baseline
    python scripts/benchmarks/routing.py --seeds 0 --steps 20 --only switch gshard

Runs go one after the other, each as `moe-llm train` takes it, so that their tokens per second can be compared; a run
that is finished is read and not repeated. Told of each, as mean and half range over the seeds: the last validation
loss; the variation of the load and the dropped share, means over layers and the last quarter of the records; tokens per
second, the median over records. `top_p` passes through as many experts as it asks for, which is told beside it.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_llm.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "configs/dense_baseline.yaml"
COLUMNS = ("validation loss", "load variation", "dropped share", "experts a token", "tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/routing"), help="where the runs lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="fewer than the files say, to try the script")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these files of configs/routing alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all runs")
    args = parser.parse_args()
    files = [*sorted((ROOT / "configs/routing").glob("*.yaml")), BASELINE]
    files = [file for file in files if args.only is None or file.stem in args.only]
    if not files:
        parser.error(f"--only {' '.join(args.only)} names no file of configs/routing")
    rows = {}
    for file in files:
        found = [measured(train(file, seed, args)) for seed in args.seeds]
        rows[file.stem] = {column: [run[column] for run in found] for column in COLUMNS}
    print(table(rows))


def train(file: Path, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a run, which is finished when this returns."""
    run_dir = args.out / f"{file.stem}-{seed}"
    overrides = [f"run.dir={run_dir}", f"run.seed={seed}", "evaluate.sample_prompt=null", *args.set]
    if args.steps is not None:
        overrides.append(f"train.max_steps={args.steps}")
    command = [sys.executable, "-m", "moe_llm.cli", "train", str(file), *overrides]
    subprocess.run(command, cwd=Path.cwd(), check=True, stdout=subprocess.DEVNULL)
    return read_metrics(run_dir / "metrics.jsonl")


def measured(records: list[dict[str, Any]]) -> dict[str, float]:
    """What the table tells of one run."""
    late = [record["moe"] for record in records[-max(1, len(records) // 4) :]]

    def mean(key: str) -> float:
        return statistics.fmean(value for moe in late for value in moe[key])

    return dict(zip(COLUMNS, (
        next(record["val_loss"] for record in reversed(records) if record.get("val_loss") is not None),
        mean("load_cv"), mean("dropped_share"), mean("experts_per_token"),
        statistics.median(record["tokens_per_second"] for record in records),
    ), strict=True))


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """As markdown, the lowest validation loss first."""
    order = sorted(rows, key=lambda name: statistics.fmean(rows[name][COLUMNS[0]]))
    lines = ["| routing | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name in order:
        cells = [cell(rows[name][column], ".0f" if column == "tokens/s" else ".3f") for column in COLUMNS]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: list[float], how: str) -> str:
    """Mean and half range."""
    return f"{statistics.fmean(values):{how}} ± {(max(values) - min(values)) / 2:{how}}"


if __name__ == "__main__":
    main()

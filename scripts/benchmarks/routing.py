"""Every way to route on the quickstart's data, at equal active parameters and tokens: one table.

    python scripts/benchmarks/routing.py                         # configs/routing/*.yaml and the dense baseline
    python scripts/benchmarks/routing.py --seeds 0 --steps 20 --rounds 1 --only switch gshard mixtral

Each run is as `moe-llm train` takes it; one that is finished is read and not repeated. Told of each, as mean and half
range over the seeds: the last validation loss; the variation of the load and the dropped share, means over layers and
the last quarter of the records; the experts that a token passes through, of which `top_p` and `expert_choice` take as
many as they ask for.

Tokens per second come from `moe-llm bench` after all training: in each of `--rounds` rounds all files take turns. Told
is the median over rounds of a file's speed divided by that of mixtral's in the same round, since machines are shared.

Results: JSON and a table in Markdown, in --out.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from moe_llm.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "configs/dense_baseline.yaml"
COLUMNS = ("validation loss", "load variation", "dropped share", "experts a token")
SPEED = "tokens/s to mixtral's"
MOE_LLM = [sys.executable, "-m", "moe_llm.cli"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/routing_benchmark", help="where the runs lie")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of each run, if not as many as the files say")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0: none")
    parser.add_argument("--bench-steps", type=int, default=5, help="timed steps of a file in a round")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these files of configs/routing alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all runs")
    args = parser.parse_args()
    files = [*sorted((ROOT / "configs/routing").glob("*.yaml")), BASELINE]
    files = [file for file in files if args.only is None or file.stem in args.only]
    if not files:
        parser.error(f"--only {' '.join(args.only)} names no file of configs/routing")
    if args.rounds and "mixtral" not in [file.stem for file in files]:
        parser.error("speeds are told as multiples of mixtral's: add mixtral to --only, or give --rounds 0")
    rows: dict[str, dict[str, list[float]]] = {}
    for file in files:
        found = [measured(train(file, seed, args)) for seed in args.seeds]
        rows[file.stem] = {column: [run[column] for run in found] for column in COLUMNS}
        print(f"{file.stem}: {cell(rows[file.stem][COLUMNS[0]])}", flush=True)
    for name, ratios in speeds(files, args).items():
        rows[name][SPEED] = ratios
    told = table(rows)
    print(told)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"routing-{date.today().isoformat()}"
    environment = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    content = {"environment": environment, "steps": args.steps, "seeds": args.seeds, "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(told + "\n", encoding="utf-8")
    print(f"written: {stem}.json, {stem}.md")


def train(file: Path, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a run, which is finished when this returns."""
    run_dir = args.work / f"{file.stem}-{seed}"
    overrides = [f"run.dir={run_dir}", f"run.seed={seed}", "evaluate.sample_prompt=null", *args.set]
    if args.steps is not None:
        overrides.append(f"train.max_steps={args.steps}")
    subprocess.run([*MOE_LLM, "train", str(file), *overrides], check=True, stdout=subprocess.DEVNULL)
    return read_metrics(run_dir / "metrics.jsonl")


def measured(records: list[dict[str, Any]]) -> dict[str, float]:
    """What the table tells of one run."""
    late = [record["moe"] for record in records[-max(1, len(records) // 4) :]]

    def mean(key: str) -> float:
        return statistics.fmean(value for moe in late for value in moe[key])

    loss = next(record["val_loss"] for record in reversed(records) if record.get("val_loss") is not None)
    values = (loss, mean("load_cv"), mean("dropped_share"), mean("experts_per_token"))
    return dict(zip(COLUMNS, values, strict=True))


def speeds(files: list[Path], args: argparse.Namespace) -> dict[str, list[float]]:
    """name -> its tokens per second over mixtral's, in each round."""
    ratios: dict[str, list[float]] = {file.stem: [] for file in files} if args.rounds else {}
    for _ in range(args.rounds):
        found = {file.stem: speed(file, args) for file in files}
        for name, value in found.items():
            ratios[name].append(value / found["mixtral"])
    return ratios


def speed(file: Path, args: argparse.Namespace) -> float:
    """Tokens per second of a few steps."""
    command = [*MOE_LLM, "bench", str(file), "--json", "--steps", str(args.bench_steps), *args.set]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["tokens_per_second"]


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """As markdown, the lowest validation loss first."""
    order = sorted(rows, key=lambda name: statistics.fmean(rows[name][COLUMNS[0]]))
    timed = all(SPEED in row for row in rows.values())
    columns = [*COLUMNS, SPEED] if timed else COLUMNS
    lines = ["| routing | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in order:
        cells = [cell(rows[name][column]) for column in COLUMNS]
        if timed:
            cells.append(f"{statistics.median(rows[name][SPEED]):.2f}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    """Mean and half range."""
    return f"{statistics.fmean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


if __name__ == "__main__":
    main()

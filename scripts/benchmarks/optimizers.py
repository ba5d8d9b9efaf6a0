"""Optimizers on the quickstart: held-out loss, peak memory and seconds a step, each cell in a process of its own.

    python scripts/benchmarks/optimizers.py                                   # 240 steps, three seeds: hours on two cores
    python scripts/benchmarks/optimizers.py --steps 60 --seeds 0 1 2          # in less

Every optimizer sees the same blocks, 24 steps of warm-up and weight decay 0.1; each has the best of its rates in
`RATES` by the first seed, and all seeds at that rate, the optimizers by turns. Results: a table in Markdown on stdout, and JSON in --out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# highest rates to choose from; "constant" where the optimizer demands it, else cosine
RATES = {
    "adamw": (1e-3, 3e-3),
    "adamw_8bit": (1e-3, 3e-3),
    "muon": (3e-3, 1e-2),
    "lion": (3e-4, 1e-3),
    "schedule_free": (3e-3, 1e-2),
    "sgd": (0.3, 1.0),
}


def cell(name: str, rate: float, seed: int, steps: int, work: Path, small: bool) -> dict:
    """Train once in a process of its own: held-out loss, median seconds a step, and peak memory."""
    run = work / f"{name}-{rate:g}-{seed}"
    overrides = [
        f"run.dir={run}", f"run.seed={seed}", f"train.max_steps={steps}", f"optim.name={name}", f"optim.lr={rate}",
        f"optim.schedule={'constant' if name == 'schedule_free' else 'cosine'}", f"optim.warmup_steps={min(24, steps // 4)}",
        f"evaluate.every_steps={steps}", "evaluate.sample_prompt=null", "checkpoint.every_steps=null",
        "logging.every_steps=1", "logging.console=off",
    ]  # fmt: skip
    if small:
        overrides += ["model.num_hidden_layers=2", "model.hidden_size=96", "model.intermediate_size=128"]
        overrides += ["data.sequence_length=128", "train.micro_batch_size=8", "train.global_batch_size=8"]
    command = [sys.executable, __file__, "--one", str(ROOT / "configs/quickstart.yaml"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} at {rate:g}: {done.stderr[-1000:]}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["step_time"] for record in records[2:] if "step_time" in record]
    return {
        "optimizer": name,
        "lr": rate,
        "seed": seed,
        "val_loss": records[-1]["val_loss"],
        "step_seconds": statistics.median(seconds) if seconds else None,
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in records[2:] if "tokens_per_second" in r)
        if any("tokens_per_second" in r for r in records[2:])
        else None,
        "peak_mib": int(done.stdout.strip().splitlines()[-1]) / 1024,
    }


def one(words: list[str]) -> None:
    from moe_llm.cli import main

    code = main(["train", *words])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    raise SystemExit(code)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--small", action="store_true", help="two layers of width 96 and short blocks")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts/benchmarks/results/optimizers.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="optimizers-") as work:
        best = {}
        for name in args.optimizers:
            tried = [cell(name, rate, args.seeds[0], args.steps, Path(work), args.small) for rate in RATES[name]]
            best[name] = min(tried, key=lambda row: row["val_loss"])
            print(json.dumps({"tried": tried}), file=sys.stderr, flush=True)
        rows += best.values()
        for seed in args.seeds[1:]:  # by turns, so that what else the machine does meets all alike
            rows += [cell(name, best[name]["lr"], seed, args.steps, Path(work), args.small) for name in args.optimizers]
            print(json.dumps({"seed": seed, "rows": rows[-len(args.optimizers) :]}), file=sys.stderr, flush=True)
    args.out.write_text(json.dumps({"steps": args.steps, "small": args.small, "rows": rows}, indent=1) + "\n")
    print(
        "| optimizer | best rate | held-out loss | spread | peak memory, MiB | tokens per second |\n|---|---|---|---|---|---|"
    )
    for name in args.optimizers:
        own = [row for row in rows if row["optimizer"] == name]
        losses = [row["val_loss"] for row in own]
        speed = [row["tokens_per_second"] for row in own if row["tokens_per_second"]]
        print(
            f"| {name} | {own[0]['lr']:g} | {statistics.mean(losses):.4f} | {max(losses) - min(losses):.4f} | "
            f"{statistics.mean(row['peak_mib'] for row in own):.0f} | {statistics.median(speed) if speed else 0:.0f} |"
        )


if __name__ == "__main__":
    main()

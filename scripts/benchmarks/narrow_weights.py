"""What narrower gradients and weights cost in loss: the quickstart, with three seeds, each way with the same batches.

    python scripts/benchmarks/narrow_weights.py                 # the whole quickstart: an hour or more on two cores
    python scripts/benchmarks/narrow_weights.py --steps 60      # a first impression

Ways: fp32 masters and gradients; bf16 gradients; bf16 gradients with stochastic rounding; the same with Kahan sums. All in
bf16, the schedule as the quickstart has it for so many steps. Reported is the held-out loss at the end, its mean over the
seeds, and how far each way is from the first one with the same seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NARROW = ["parallel.gradient_dtype=bf16"]
WAYS = {
    "fp32 masters": [],
    "bf16 gradients": NARROW,
    "stochastic rounding": [*NARROW, "optim.master_weights=stochastic_rounding"],
    "kahan": [*NARROW, "optim.master_weights=kahan"],
}


def final_loss(way: str, seed: int, steps: int | None, room: Path, config: Path, more: list[str]) -> float:
    """Held-out loss (nats) after the last step of one run."""
    directory = room / f"{way.replace(' ', '-')}-{seed}"
    overrides = [f"run.dir={directory}", f"run.seed={seed}", "train.precision=bf16", *WAYS[way], *more]
    if steps is not None:
        overrides += [f"train.max_steps={steps}", f"evaluate.every_steps={steps}", "checkpoint.every_steps=null"]
    command = [sys.executable, "-m", "moe_llm.cli", "train", str(config), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way}, seed {seed}: {done.stderr[-2000:]}")
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["val_loss"] for record in records if "val_loss" in record][-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of each run; as the configuration has it unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("overrides", nargs="*", help="of the configuration, for every way")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as room:
        for seed in arguments.seeds:
            for way in WAYS:
                loss = final_loss(way, seed, arguments.steps, Path(room), arguments.config, arguments.overrides)
                found[way].append(loss)
                print(f"seed {seed}, {way}: {loss:.4f}", flush=True)
    first = found["fp32 masters"]
    print(f"{'way':<22} {'mean':>8} {'apart from fp32 masters, by seed':>40}")
    for way, losses in found.items():
        apart = " ".join(f"{loss - base:+.4f}" for loss, base in zip(losses, first))
        print(f"{way:<22} {statistics.mean(losses):>8.4f} {apart:>40}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

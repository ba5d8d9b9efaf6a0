"""Time a step on two ranks with shared experts (EP=2) against plain data parallelism (EP=1), one thread each.

    python scripts/benchmarks/ranks.py [CONFIG] [overrides] [--rounds 3] [--steps 5] [--out scripts/benchmarks/results]

The same configuration, the same global batch; launches of `moe-llm bench` take turns, so that a busy machine slows both
alike: read the ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch",
    "--config_file",
    str(ROOT / "configs/accelerate/cpu_2.yaml"),
    "-m",
    "moe_llm.cli",
    "bench",
]


def seconds(config: str, overrides: list[str], size: int, steps: int) -> dict:
    """The report of one launch."""
    command = [*LAUNCH, config, "--steps", str(steps), "--json", *overrides, f"parallel.expert_parallel_size={size}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout[done.stdout.index("{\n") :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs/quickstart.yaml"))
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    reports: dict[int, list[dict]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for size, found in reports.items():
            found.append(seconds(arguments.config, arguments.overrides, size, arguments.steps))
            print(f"EP={size}: {found[-1]['seconds'] * 1e3:.0f} ms a step", flush=True)
    medians = {size: statistics.median(report["seconds"] for report in found) for size, found in reports.items()}
    ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(reports[1], reports[2], strict=True))
    print(
        f"EP=2 takes {ratio:.2f} times the step of plain data parallelism "
        f"({medians[2] * 1e3:.0f} against {medians[1] * 1e3:.0f} ms)"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"date": date.today().isoformat(), "command": " ".join(["python", *sys.argv]), "ratio": ratio}
    file = arguments.out / f"ranks-{about['date']}.json"
    about["reports"] = {f"EP={size}": found for size, found in reports.items()}
    file.write_text(json.dumps(about, indent=1) + "\n")
    print(f"written: {file}")


if __name__ == "__main__":
    main()

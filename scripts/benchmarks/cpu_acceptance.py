"""What a CPU gives, in one command on a machine that does nothing else: neighbours, products, and processors without AVX-512.

    python scripts/benchmarks/cpu_acceptance.py                        # about ten minutes on two cores
    python scripts/benchmarks/cpu_acceptance.py --only neighbour --rounds 5

neighbour: tokens per second of the quickstart, idle and beside one busy process, with our way of waiting and with
libgomp's own, by turns; goals: 0.97 of libgomp's own idle, and at least 0.5 of that beside the neighbour.
products: fp32 and bf16 products at the quickstart's and at wider shapes, by our kernel, by oneDNN and by torch (MKL), by turns.
avx2: the step against transformers' best where torch, oneDNN and our kernels know no more than AVX2 (x86-64-v3), in fp32;
goal: 1.10 times transformers' best, or products that are 93% of the step.

Everything that is compared takes turns, so that only ratios are to be read. Writes a JSON file.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# what takes libgomp's waiting back to its own
LIBGOMPS_OWN = {"GOMP_SPINCOUNT": "300000"}


def spin() -> None:
    """A neighbour that never rests."""
    while True:
        pass


@contextmanager
def neighbour(busy: bool):
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True) if busy else None
    if process is not None:
        process.start()
        time.sleep(2.0)  # until it spins
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.join()


def quickstart_rate(environment: dict[str, str], steps: int, room: Path) -> float:
    """Tokens per second of the quickstart's later steps."""
    directory = Path(tempfile.mkdtemp(dir=room))
    overrides = [
        f"run.dir={directory}", f"train.max_steps={steps}", "logging.every_steps=1", "logging.console=off",
        "checkpoint.every_steps=null", "evaluate={max_blocks: 1}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "moe_llm.cli", "train", str(ROOT / "configs/quickstart.yaml"), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line)["tokens_per_second"] for line in lines]
    return statistics.median(rates[len(rates) // 3 :])


def neighbours(rounds: int, steps: int) -> dict[str, Any]:
    ways = {"ours": {}, "libgomp's own": LIBGOMPS_OWN}
    found: dict[str, dict[str, list[float]]] = {way: {"idle": [], "busy": []} for way in ways}
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        quickstart_rate({}, 3, room)  # text and kernels are in their caches from here on
        for _ in range(rounds):
            for state in ("idle", "busy"):
                with neighbour(state == "busy"):
                    for way, environment in ways.items():
                        found[way][state].append(quickstart_rate(environment, steps, room))
    rates = {way: {state: statistics.median(samples) for state, samples in by.items()} for way, by in found.items()}
    idle = rates["libgomp's own"]["idle"]
    ratios = {
        "idle, ours over libgomp's own": rates["ours"]["idle"] / idle,
        "busy, ours over libgomp's own idle": rates["ours"]["busy"] / idle,
        "busy, libgomp's own over its idle": rates["libgomp's own"]["busy"] / idle,
    }
    return {"tokens_per_second": rates, "samples": found, "ratios": ratios}


def products(rounds: int) -> dict[str, Any]:
    import torch

    from moe_llm.ops import native

    shapes = {
        "quickstart, projection": (2048, 192, 192),
        "quickstart, expert": (512, 192, 512),
        "wide, projection": (2048, 512, 512),
        "wide, expert": (512, 512, 3584),
        "wide, head": (2048, 512, 8192),
    }
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (rows, inner, columns) in shapes.items():
            a, w = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
            out = torch.empty(rows, columns, dtype=dtype)
            ways: dict[str, Callable[[], Any]] = {
                "ours": lambda a=a, w=w, out=out: native.matmul(a, w, out, transpose_b=True),
                "oneDNN": lambda a=a, w=w: torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], ""),
                "torch": lambda a=a, w=w: torch.mm(a, w.t()),
            }
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = by_turns(ways, rounds)
    return found


def by_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Of each way the median time, and its ratio to ours; a way that does not run is named with its error."""
    samples: dict[str, list[float]] = {}
    failures = {}
    for way, run in ways.items():
        try:
            run()
            samples[way] = []
        except RuntimeError as error:
            failures[way] = str(error).splitlines()[0]
    for round_ in range(5 * rounds):
        order = list(samples) if round_ % 2 else list(reversed(samples))
        for way in order:
            begin = time.perf_counter()
            for _ in range(20):
                ways[way]()
            samples[way].append((time.perf_counter() - begin) / 20)
    seconds = {way: statistics.median(own) for way, own in samples.items()}
    result: dict[str, Any] = {"seconds": seconds, "failures": failures}
    if "ours" in seconds:
        result["time_over_ours"] = {way: value / seconds["ours"] for way, value in seconds.items()}
    return result


def avx2(rounds: int) -> dict[str, Any]:
    """`step.py` at hidden 640, width 1536, 3 layers, 4 x 640 tokens, in a process that knows no AVX-512."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("there is no g++ to compile our kernels for AVX2 with")
    with tempfile.TemporaryDirectory() as name:
        wrapper = Path(name) / "g++"
        wrapper.write_text(f'#!/bin/sh\nexec {compiler} $(printf "%s " "$@" | sed s/-march=native/-march=x86-64-v3/)\n')
        wrapper.chmod(0o755)
        environment = {
            **os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "CXX": str(wrapper), "XDG_CACHE_HOME": name, "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [
            sys.executable, str(HERE / "step.py"), "--suites", "avx2", "--dtype", "fp32", "--rounds", str(max(5, rounds)),
            "--out", name,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        [file] = Path(name).glob("*.json")
        return json.loads(file.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("neighbour", "products", "avx2")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each part")
    parser.add_argument("--steps", type=int, default=40, help="of the quickstart, each time")
    parser.add_argument("--out", type=Path, default=HERE / "results/cpu-acceptance.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    run: dict[str, Callable[[], Any]] = {
        "neighbour": lambda: neighbours(arguments.rounds, arguments.steps),
        "products": lambda: products(arguments.rounds),
        "avx2": lambda: avx2(arguments.rounds),
    }
    found: dict[str, Any] = {"cores": os.cpu_count()}
    for part in arguments.only:
        try:
            found[part] = run[part]()
        except Exception as error:  # noqa: BLE001 - the parts after it have their own things to say
            found[part] = f"FAILED: {type(error).__name__}: {error}"
        print(part, json.dumps(found[part], indent=1), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(isinstance(found[part], str) for part in arguments.only))


if __name__ == "__main__":
    sys.exit(main())

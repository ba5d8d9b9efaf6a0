"""Time the training step of this package against that of others, on the same weights and batches.

    python scripts/benchmarks/step.py [--suites main fine-grained skew tokens experts memory] [--dtype bf16 fp32]
                                      [--threads 2] [--rounds 9] [--optimizer] [--device cpu] [--out DIRECTORY]
    python scripts/benchmarks/step.py --suites main --compiled ours transformers:grouped_mm     # beside torch.compile
    python scripts/benchmarks/step.py --suites cuda --dtype bf16     # on a CUDA device

Contenders are transformers' Mixtral with each of its experts implementations, and with the MoE layers of DeepSpeed,
ScatterMoE, MegaBlocks and SonicMoE (see other_layers.py); one that is not installed or does not train is reported.
They take turns within one process, so that a busy machine slows all of them alike: read the ratios, not the
times. Every batch is new, and routes differently: kernels that are compiled for a shape pay for it as in training.
The step's bare matrix products, at their own shapes, take turns with them, and a plain product of 2048 x 2048 (8192
on CUDA) is timed at the end. A contender whose loss or gradients differ from those of transformers' plain loop in fp32
by more than transformers' own rounding explains is reported and not timed. Peak memory is that of a process of its own,
the median of several. On a CPU malloc keeps what is freed, for all contenders, as in training.

On CUDA, `cuda` is Mixtral 8x7B's true shape at 4096 tokens, with as many layers as leave room for all contenders at
once, and a fine-grained shape; `ours:liger` and `ours:compiled` are ours with train.kernels=liger and train.compile. Each contender's first steps, which compile and tune kernels, are not timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from admission import build_all, departures, free
from contenders import (
    CUDA,
    MIXTRAL_LAYER,
    Shape,
    batches,
    contender,
    contender_names,
    installed,
    shape_that_fits,
    weights,
)

from moe_llm.bench.products import peak_rate, prepare_products, step_products, synchronize
from moe_llm.ops import host_memory

MAIN = Shape(batch=4, length=512)
QUICKSTART = Shape(8, 256, hidden=192, width=256, heads=6, vocabulary=4096)
FINE_GRAINED = Shape(4, 512, width=256, experts=64, top_k=6)
SUITES: dict[str, dict[str, Shape]] = {
    "main": {"main": MAIN},
    "quickstart": {"quickstart": QUICKSTART},
    "fine-grained": {"fine-grained": FINE_GRAINED},
    "avx2": {"avx2": Shape(4, 640, hidden=640, width=1536, layers=3, heads=10)},
    "mixtral": {"one layer of Mixtral 8x7B": MIXTRAL_LAYER},
    "lengths": {f"1 x {length}": replace(MAIN, batch=1, length=length) for length in (512, 1024, 2048, 4096, 8192)},
    "skew": {"balanced": MAIN, "60% of tokens to one expert": replace(MAIN, share=0.6)},
    "tokens": {f"{n} tokens": replace(MAIN, batch=n // 512) for n in (1024, 2048, 4096, 8192, 16384)},
    # as many parameters in each, and as many active: experts cut in halves, twice as many chosen
    "experts": {f"{8 * n} experts": replace(MAIN, experts=8 * n, top_k=2 * n, width=1792 // n) for n in (1, 2, 4, 8)},
}
ACROSS = ("skew", "tokens", "experts")  # what is asked there is how one shape compares with another
MEMORY = {f"4 x {length}": replace(MAIN, length=length) for length in (512, 4096)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def step(model, ids, optimizer) -> None:
    model(ids).backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def timed(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def compare(name: str, shape: Shape, dtype: str, arguments) -> dict:
    """Median step times of all contenders at one shape, with what they are to be held against."""
    kind, device = DTYPES[dtype], torch.device(arguments.device)
    chosen = [n for n in contender_names(shape, device=device.type) if n in arguments.only or not arguments.only]
    if device.type == "cuda":
        together = {*filter(installed, chosen), "transformers:eager"}
        shape = shape_that_fits(shape, len(together), kind, torch.cuda.mem_get_info()[0])
    state = weights(shape)
    ids = [batch.to(device) for batch in batches(shape, arguments.rounds + 2)]
    chosen += [f"{n}+compiled" for n in arguments.compiled if n in chosen]
    models, failures = build_all([*dict.fromkeys([*chosen, "transformers:eager"])], shape, state, kind, ids[0])
    found = departures(models, shape, state, ids[0], dtype)
    refused = {n: f"differs by {d:.2g} times what is allowed: not timed" for n, d in found.items() if not d <= 1}
    models = {n: m for n, m in models.items() if n not in refused and n in chosen}
    optimizers = {
        n: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) if arguments.optimizer else None
        for n, m in models.items()
    }
    if device.type == "cpu":
        host_memory.keep_freed()
    counts = models["ours"].counts(ids[0]) if "ours" in models else even_counts(shape)
    products = prepare_products(step_products(shape.config, shape.batch, shape.length, counts), kind, device)
    seconds: dict[str, list[float]] = {n: [] for n in models}
    alone: dict[str, list[float]] = {part: [] for part in products}
    for round_, batch in enumerate(ids):
        turns = [
            *((seconds[n], partial(step, models[n], batch, optimizers[n])) for n in models),
            *((alone[part], run) for part, (_, run) in products.items()),
        ]
        for samples, run in turns if round_ % 2 else reversed(turns):
            elapsed = timed(run, device)
            if round_ >= 2:
                samples.append(elapsed)
    flops = sum(part_flops for part_flops, _ in products.values())
    bare = [sum(parts) for parts in zip(*alone.values(), strict=True)]
    result = {
        "name": name,
        "dtype": dtype,
        "shape": asdict(shape),
        "flops": flops,
        "busiest_expert": busiest(counts, shape),
        "bare_products": {
            "seconds": statistics.median(bare),
            "flops_per_second": flops / statistics.median(bare),
            "parts": {part: statistics.median(samples) for part, samples in alone.items()},
        },
        "peak_flops_per_second": peak_rate(kind, device, 8192 if device.type == "cuda" else 2048),
        "failures": failures | refused,
        "contenders": {},
    }
    rivals = [n for n in seconds if n.startswith("transformers:")]
    best = min(rivals, key=lambda n: statistics.median(seconds[n])) if rivals else None
    for n, samples in seconds.items():
        median = statistics.median(samples)
        result["contenders"][n] = {
            "seconds": median,
            "quartiles": statistics.quantiles(samples, n=4),
            "departure": found[n],
            "flops_per_second": flops / median,
            "tokens_per_second": shape.tokens / median,
            "first_step_seconds": models[n].first_step_seconds,
            "share_of_bare_products": statistics.median(
                products / own for products, own in zip(bare, samples, strict=True)
            ),
        }
        if best is not None:
            result["contenders"][n]["times_best_transformers"] = statistics.median(
                theirs / own for theirs, own in zip(seconds[best], samples, strict=True)
            )
    del models, optimizers
    free()
    return result


def across(shapes: dict[str, Shape], dtype: str, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Our time per token at each shape, divided by that at the first: the median over rounds in which all take turns,
    since a machine's speed changes more between minutes than what is to be seen."""
    models = {name: contender("ours", shape, weights(shape), DTYPES[dtype], device) for name, shape in shapes.items()}
    ids = {name: batches(shape, rounds + 1) for name, shape in shapes.items()}
    ratios: dict[str, list[float]] = {name: [] for name in shapes}
    for round_ in range(rounds + 1):
        per_token = {}
        for name, shape in shapes.items():
            batch = ids[name][round_].to(device)
            run = partial(step, models[name], batch, None)
            per_token[name] = timed(run, batch.device) / shape.tokens
        if round_:
            first = next(iter(per_token.values()))
            for name, value in per_token.items():
                ratios[name].append(value / first)
    return {name: statistics.median(found) for name, found in ratios.items()}


def even_counts(shape: Shape) -> list[list[int]]:
    rows = shape.tokens * shape.top_k // shape.experts
    return [[rows] * shape.experts] * shape.layers


def busiest(counts: list[list[int]], shape: Shape) -> float:
    """The largest share of the tokens that one expert got, in any layer."""
    return max(max(layer) for layer in counts) / shape.tokens


def peak_memory(name: str, shape: Shape, dtype: str, threads: int, optimizer: bool, device: str) -> dict:
    """Bytes that a process of its own took at most for `name`'s steps, beyond what it had before the model."""
    arguments = json.dumps(
        {
            "name": name,
            "shape": asdict(shape),
            "dtype": dtype,
            "threads": threads,
            "optimizer": optimizer,
            "device": device,
        }
    )
    command = [sys.executable, __file__, "--measure-memory", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(arguments: str) -> None:
    """In the process of its own: peak memory (resident, or allocated on CUDA) over three steps, the parameters', and
    that of all tensors over one more step, which what the C library keeps of freed memory has no part in."""
    given = json.loads(arguments)
    torch.set_num_threads(given["threads"])
    shape, dtype = Shape(**given["shape"]), DTYPES[given["dtype"]]
    import transformers  # noqa: F401 - so that both contenders have paid for it

    state = weights(shape)
    model = contender(given["name"], shape, state, dtype, given["device"])
    del state
    free()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    on_cuda = given["device"] == "cuda"
    before = 0 if on_cuda else resident() - parameters
    if not on_cuda:
        host_memory.keep_freed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if given["optimizer"] else None
    steps = [ids.to(given["device"]) for ids in batches(shape, 4)]
    if on_cuda:
        step(model, steps[3], optimizer)  # tuning kernels takes memory that training does not
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for ids in steps[:3]:
        step(model, ids, optimizer)
    peak = torch.cuda.max_memory_allocated() if on_cuda else resident("VmHWM")
    kept = (
        parameters
        if optimizer is None
        else parameters + sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    )
    tensors = peak if on_cuda else kept + most_allocated(lambda: step(model, steps[3], optimizer))
    print(json.dumps({"peak": peak - before, "parameters": parameters, "tensors": tensors}))


def most_allocated(run: Callable[[], None]) -> int:
    """Bytes that torch's CPU allocator had given out at most since `run` began, by its profiler's record."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def resident(field: str = "VmRSS") -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def memory_suite(arguments, dtype: str) -> list[dict]:
    rows = []
    on_cuda = arguments.device == "cuda"
    ours = [n for n in contender_names(MAIN, device=arguments.device) if n.startswith("ours")]
    names = [
        n for n in (*ours, "transformers:grouped_mm", "transformers:eager") if n in arguments.only or not arguments.only
    ]
    shapes = {n: s for n, s in (CUDA if on_cuda else MEMORY).items() if n in arguments.shapes or not arguments.shapes}
    for name, shape in shapes.items():
        if on_cuda:
            shape = shape_that_fits(shape, 1, DTYPES[dtype], torch.cuda.mem_get_info()[0])
        row = {"name": f"memory {name}", "dtype": dtype, "shape": asdict(shape), "peak_bytes": {}}
        runs = [
            {n: peak_memory(n, shape, dtype, arguments.threads, arguments.optimizer, arguments.device) for n in names}
            for _ in range(arguments.memory_rounds)
        ]
        for n in names:
            row["peak_bytes"][n] = {what: statistics.median(run[n][what] for run in runs) for what in runs[0][n]}
            row["peak_bytes"][n]["peaks"] = [run[n]["peak"] for run in runs]
        for what, key in (("peak", "ours_to_best_transformers"), ("tensors", "ours_to_best_transformers_in_tensors")):
            rivals = [n for n in names if not n.startswith("ours")]
            if rivals and "ours" in names:
                ratios = [run["ours"][what] / min(run[n][what] for n in rivals) for run in runs]
                row[key], row[key + "_each"] = statistics.median(ratios), ratios
        rows.append(row)
    return rows


def show(result: dict) -> None:
    if "peak_bytes" in result:
        print(f"{result['name']}, {result['dtype']}", flush=True)
        for name, value in result["peak_bytes"].items():
            print(
                f"  {name:28} {value['peak'] / 2**20:8.0f} MiB; tensors alone {value['tensors'] / 2**20:.0f}, of "
                f"which parameters {value['parameters'] / 2**20:.0f}"
            )
        if "ours_to_best_transformers" in result:
            each = ", ".join(f"{ratio:.3f}" for ratio in result["ours_to_best_transformers_each"])
            print(
                f"  ours / transformers' least    {result['ours_to_best_transformers']:.3f} ({each}); tensors alone "
                f"{result['ours_to_best_transformers_in_tensors']:.3f}"
            )
        return
    if "contenders" in result:
        show_contenders(result)
    if "time_per_token_to_first" in result:
        print(
            f"  {result['name']}, {result['dtype']}, taking turns with the suite's other shapes: ours takes "
            f"{result['time_per_token_to_first']:.2f} times the first one's time per token",
            flush=True,
        )


def show_contenders(result: dict) -> None:
    bare = result["bare_products"]
    print(
        f"{result['name']}, {result['dtype']}: {result['flops'] / 1e9:.0f} GFLOP a step; its bare products alone "
        f"{bare['seconds'] * 1e3:.0f} ms, {bare['flops_per_second'] / 1e9:.0f} GFLOP/s; a square product "
        f"{result['peak_flops_per_second'] / 1e9:.0f}; busiest expert {result['busiest_expert']:.0%} of tokens"
    )
    for name, row in sorted(result["contenders"].items(), key=lambda item: item[1]["seconds"]):
        ratio = row.get("times_best_transformers")
        print(
            f"  {name:28} {row['seconds'] * 1e3:9.1f} ms {row['flops_per_second'] / 1e9:7.0f} GFLOP/s  "
            f"products {row['share_of_bare_products']:4.0%}  {row['tokens_per_second']:8.0f} tokens/s"
            + ("" if ratio is None else f"  {ratio:5.2f}x")
            + (f"  first step {row['first_step_seconds']:.0f} s" if "+" in name else "")
        )
    for name, why in result["failures"].items():
        print(f"  {name:28} {why}", flush=True)


def environment(arguments) -> dict:
    import platform

    import transformers

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")), "")
    return {
        "date": date.today().isoformat(),
        "suites": arguments.suites,
        "command": " ".join(["python", *sys.argv]),
        "cpu": model or platform.machine(),
        "device": arguments.device,
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else "",
        "amx": "amx_bf16" in flags,
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "optimizer": arguments.optimizer,
    }


def write(results: list[dict], about: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    stem = out / "-".join(["step", about["date"], *about["suites"]])
    stem.with_suffix(".json").write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    plot([r for r in results if "contenders" in r], stem.with_suffix(".png"))


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    if not results:
        return
    figure, axis = pyplot.subplots(figsize=(9, 0.5 + 0.7 * len(results)))
    labels = [f"{r['name']}, {r['dtype']}" for r in results]
    series = {"ours": [], "transformers' best": [], "bare products": []}
    for r in results:
        rates = {n: c["flops_per_second"] / 1e9 for n, c in r["contenders"].items()}
        series["ours"].append(rates.get("ours", 0))
        theirs = [rate for n, rate in rates.items() if n.startswith("transformers:")]
        series["transformers' best"].append(max(theirs, default=0))
        series["bare products"].append(r["bare_products"]["flops_per_second"] / 1e9)
    for offset, (name, values) in enumerate(series.items()):
        axis.barh([i + 0.27 * (offset - 1) for i in range(len(labels))], values, 0.25, label=name)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("GFLOP/s")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=[*SUITES, "cuda", "memory"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=[], help="contenders, such as ours transformers:grouped_mm")
    parser.add_argument("--compiled", nargs="+", default=[], help="contenders that also run by torch.compile")
    parser.add_argument(
        "--turns-only",
        action="store_true",
        help="of skew, tokens and experts only how our time per token at one shape compares with that at another",
    )
    parser.add_argument("--optimizer", action="store_true", help="with the update, by AdamW")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--shapes", nargs="+", default=[], choices=[*MEMORY, *CUDA], help="of memory only these")
    parser.add_argument("--memory-rounds", type=int, default=3, help="processes of each contender, taking turns")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory:
        return measure_memory(arguments.measure_memory)
    on_cuda = arguments.device == "cuda"
    arguments.suites = arguments.suites or (
        ["cuda", "memory"] if on_cuda else ["main", "skew", "tokens", "experts", "memory"]
    )
    if "cuda" in arguments.suites and not on_cuda:
        parser.error("--suites cuda needs a CUDA device: leave it out, or give --device cuda where there is one")
    torch.set_num_threads(arguments.threads)
    about, results = environment(arguments), []
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "command"))
    for dtype in arguments.dtype:
        for suite in arguments.suites:
            shapes = {**SUITES, "cuda": CUDA}.get(suite, {})
            if suite == "memory":
                rows = memory_suite(arguments, dtype)
            elif suite in ACROSS and arguments.turns_only:
                rows = [{"name": name, "dtype": dtype, "shape": asdict(shape)} for name, shape in shapes.items()]
            else:
                rows = [compare(name, shape, dtype, arguments) for name, shape in shapes.items()]
            if suite in ACROSS and (not arguments.only or "ours" in arguments.only):
                ratios = across(SUITES[suite], dtype, arguments.rounds, arguments.device)
                for row in rows:
                    row["time_per_token_to_first"] = ratios[row["name"]]
            for row in rows:
                row["suite"] = suite
                show(row)
            results += rows
            write(results, about, arguments.out)  # what there is, should the rest be interrupted
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()

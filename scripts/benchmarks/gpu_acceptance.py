"""The first minutes on a GPU, in one command: what runs, what agrees, how fast, in how much memory, and what waits.

    python scripts/benchmarks/gpu_acceptance.py            # on a GPU of 80 GB or more, under 8 minutes
    python scripts/benchmarks/gpu_acceptance.py --toy      # anywhere, at sizes that say nothing about speed

Each part is guarded: one that fails is reported with its error, and the next one goes on; one for which no time is left is
left out and named. Needs torch, transformers and pydantic, and pytest and hypothesis for the tests; neither deepspeed,
datasets nor wandb. Writes a page and a JSON file.

Parts: environment · tests (those marked `gpu`) · products (the measured rate that all else is held against) · parity (each
kernel choice against plain products in fp32) · steps (at Mixtral 8x7B's layer shape and at a fine-grained one, against
transformers' experts implementations on the same weights and batches, whose routers prefer some experts clearly) · waits (of
the host for the device, in one step) · saving (recomputation, activations in host memory, tiles: memory, time, the same
gradients) · narrow weights (bf16 weights without fp32 masters) · documents (attention at 4k and 32k).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SECONDS = 460  # of the 8 minutes; the rest is for imports and for the page
HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "triton", "deepspeed", "flash_attn", "liger_kernel", "moe_llm")
NEEDED = ("transformers", "pydantic", "pytest", "hypothesis")  # and torch, without which this file cannot be read
# Of a kernel choice against plain products in fp32, relative to the norm: a few roundings of bf16.
PARITY = 0.02


class Budget:
    """What is left of the time."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and the device."""
    found: dict[str, Any] = {"python": platform.python_version(), "versions": {}}
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "compute_capability": list(torch.cuda.get_device_capability(device)),
        }
    return found | {"device": found.get("device", platform.processor() or platform.machine())}


def gpu_tests(budget: Budget, toy: bool) -> dict[str, Any]:
    """The tests that are marked `gpu`, of operations and of the model; other files, which may need more, are not read."""
    root = HERE.parents[1]
    files = [file for folder in ("ops", "model") for file in sorted((root / "tests" / folder).glob("test_*.py"))]
    marked = [str(file) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        *marked[: 1 if toy else None],
    ]
    allowed = max(10.0, min(180.0, budget.left / 2))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=allowed)
    last = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()]
    if done.returncode not in (0, 5):  # 5: none was selected
        raise RuntimeError("\n".join(last[-15:]))
    return {"summary": last[-1] if last else ""}


def products(device: torch.device, dtype: torch.dtype, toy: bool) -> dict[str, float]:
    """FLOP/s of one square product."""
    from moe_llm.bench.products import peak_rate

    size = 128 if toy else 8192
    return {"size": size, "flops_per_second": peak_rate(dtype, device, size)}


def parity(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Output and gradients of each kernel choice against plain products in fp32, relative to the norm of these."""
    from moe_llm.ops.expert_mlp import BACKENDS, expert_mlp

    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([100, 0, 28, 64])
    x, gate_up, down = (
        torch.randn(shape, generator=generator) * scale
        for shape, scale in (((192, 64), 1.0), ((4, 256, 64), 0.125), ((4, 64, 128), 0.09))
    )

    def run(backend: str, on: torch.device, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(on, kind).requires_grad_() for t in (x, gate_up, down)]
        y = expert_mlp(*leaves, counts.to(on), backend=backend)
        return [t.float().cpu() for t in (y, *torch.autograd.grad(y.float().square().sum(), leaves))]

    exact = run("loop", torch.device("cpu"), torch.float32)
    found: dict[str, Any] = {}
    for backend in BACKENDS[1:]:
        try:
            worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(run(backend, device, dtype), exact))
            found[backend] = {"worst": worst, "agrees": worst < PARITY}
        except Exception as error:  # noqa: BLE001 - one choice of several: reported, and the others are still compared
            found[backend] = f"{type(error).__name__}: {error}"
    disagree = [name for name, value in found.items() if isinstance(value, dict) and not value["agrees"]]
    if disagree:
        raise RuntimeError(f"{', '.join(disagree)} differ from plain products: {found}")
    return found


def shapes(device: torch.device, toy: bool) -> dict[str, Any]:
    """Mixtral 8x7B's layer and a fine-grained one, or two small ones."""
    from contenders import CUDA, Shape

    if toy:
        small = Shape(1, 32, hidden=32, width=64, layers=1, heads=2, kv_heads=1, vocabulary=64)
        return {"toy": small, "toy, fine-grained": replace(small, experts=16, top_k=4, width=16)}
    return {name: replace(shape, layers=1 if "8x7B" in name else 2) for name, shape in CUDA.items()}


def steps(shape: Any, device: torch.device, dtype: torch.dtype, rate: float | None, budget: Budget, toy: bool) -> dict:
    """Forward and backward by turns: seconds, share of the measured product rate, peak memory."""
    from contenders import batches, contender, contender_names, installed, weights

    from moe_llm.bench.products import flops, step_products

    state, ids = weights(shape), [batch.to(device) for batch in batches(shape, 3 if toy else 8)]
    names = ["ours", *(n for n in contender_names(shape, device=device.type) if n.startswith("transformers:"))]
    found: dict[str, Any] = {"contenders": {}}
    work = None
    for name in filter(installed, names):
        if budget.left < 45 and not toy:
            found["contenders"][name] = "left out: no time"
            continue
        try:
            model = contender(name, shape, state, dtype, device)
            if name == "ours":
                counts = model.counts(ids[0])
                work = sum(map(flops, step_products(shape.config, shape.batch, shape.length, counts)))
                found["share_of_the_busiest_expert"] = max(max(row) / sum(row) for row in counts)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = [_timed(partial(_step, model, batch), device) for batch in ids]
            seconds = seconds[1:] if len(seconds) < 4 else seconds[3:]  # the first ones compile and tune
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
            found["contenders"][name] = {"seconds": statistics.median(seconds), "peak_gib": peak}
            if rate and work:
                found["contenders"][name]["share_of_product_rate"] = work / statistics.median(seconds) / rate
            del model
        except Exception as error:  # noqa: BLE001 - one contender of several: reported, and the others go on
            found["contenders"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if device.type == "cuda":
            torch.cuda.empty_cache()
    timed = {n: v["seconds"] for n, v in found["contenders"].items() if isinstance(v, dict)}
    others = [seconds for name, seconds in timed.items() if name != "ours"]
    if "ours" not in timed:
        raise RuntimeError(f"ours did not run: {found['contenders'].get('ours')}")
    found["times_transformers_best"] = min(others) / timed["ours"] if others else None
    return found


def _step(model: torch.nn.Module, ids: Tensor) -> None:
    model(ids).backward()
    model.zero_grad(set_to_none=True)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def waits(shape: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """How often the host waits for the device in one step of ours, by torch's own count; without a GPU by a rehearsal."""
    if device.type != "cuda":
        from moe_llm.ops import host

        seen: list[str] = []

        def read(tensor: Tensor, what: str, total: int | None) -> Any:
            seen.append(what)
            return tensor.detach().cpu().numpy()

        from contenders import batches, contender, weights

        with host.reading_with(read):
            _step(contender("ours", shape, weights(shape), dtype, device), batches(shape, 1)[0])
        return {"reads": seen}
    from contenders import batches, contender, weights

    model = contender("ours", shape, weights(shape), dtype, device)
    ids = batches(shape, 2)
    _step(model, ids[0].to(device))
    batch = ids[1].to(device)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _step(model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"count": len(found), "where": found}


# ways to hold less for the backward pass, as arguments of `MoEDecoder.save_memory`
SAVING: dict[str, dict[str, Any]] = {
    "nothing saved": {"recompute": False},
    "recomputation": {"recompute": "full"},
    "selective recomputation": {"recompute": "selective"},
    "recomputation, offload": {"recompute": "full", "offload": True},
    "offload": {"recompute": False, "offload": True},
    "recomputation, tiles": {"recompute": "full", "tiles": 4},
}


def saving(shape: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A step by each way to hold less for the backward pass: seconds, peak memory, and its departure from the plain one."""
    from contenders import batches, contender, weights

    model = contender("ours", shape, weights(shape), dtype, device)
    ids = batches(shape, 1)[0].to(device)
    found: dict[str, Any] = {}
    expected: dict[str, Tensor] = {}
    for way, how in SAVING.items():
        model.model.save_memory(**how)
        _step(model, ids)  # compiles and tunes
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = _timed(lambda: model(ids).backward(), device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        gradients = {name: gradient.float().cpu() for name, gradient in model.gradients().items()}
        model.zero_grad(set_to_none=True)
        expected = expected or gradients
        worst = max(((gradients[n] - e).norm() / e.norm().clamp(min=1e-30)).item() for n, e in expected.items())
        found[way] = {"seconds": seconds, "peak_gib": peak, "departure": worst}
    apart = [way for way, one in found.items() if one["departure"] > PARITY]
    if apart:
        raise RuntimeError(f"{', '.join(apart)} give other gradients: {found}")
    return found


def narrow_weights(device: torch.device, toy: bool) -> dict[str, float]:
    """bf16 weights after many small updates beside fp32 ones: how far the mean has moved, as a share of theirs."""
    from moe_llm.distributed.engine import add_compensation
    from moe_llm.train.bf16_adamw import BF16AdamW

    start = (
        torch.randn(2**14 if toy else 2**24, generator=torch.Generator().manual_seed(0)).add(1.0).bfloat16().to(device)
    )
    exact = torch.nn.Parameter(start.float())
    narrow = {name: torch.nn.Parameter(start.clone()) for name in ("stochastic rounding", "kahan")}
    optimizers = {name: BF16AdamW([{"params": [p]}], 1e-4, (0.9, 0.95), 1e-8) for name, p in narrow.items()}
    add_compensation(optimizers["kahan"], [narrow["kahan"]])
    reference = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for _ in range(50):
        for parameter in (exact, *narrow.values()):
            parameter.grad = torch.ones_like(parameter)
        for optimizer in (reference, *optimizers.values()):
            optimizer.step()
    moved = (exact.detach() - start.float()).mean()
    found = {name: ((p.detach().float() - start.float()).mean() / moved).item() for name, p in narrow.items()}
    if any(abs(share - 1) > 0.1 for share in found.values()):
        raise RuntimeError(f"bf16 weights do not move as fp32 ones: {found}")
    return found


def documents(length: int, device: torch.device, dtype: torch.dtype, toy: bool) -> dict[str, Any]:
    """Attention of packed documents, forward and backward: seconds, memory, and its departure from one call each."""
    from moe_llm.ops.attention import AttentionPattern, _segment_attention, attention, variable_length_kernel

    heads, groups, width = (2, 1, 16) if toy else (32, 8, 128)
    runs = [[length // 8] * 4 + [length // 4] * 2]
    generator = torch.Generator(device.type).manual_seed(0)
    q, k, v = (
        torch.randn(1, h, length, width, generator=generator, device=device, dtype=torch.float32)
        .to(dtype)
        .requires_grad_()
        for h in (heads, groups, groups)
    )
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    pattern = AttentionPattern.build(ids, document_ids=ids, runs=runs)
    found: dict[str, Any] = {"kernel": variable_length_kernel() if device.type == "cuda" else "cpu"}

    def run(one: Callable[[], Tensor]) -> list[Tensor]:
        y = one()
        return [y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))]

    ours = partial(run, partial(attention, q, k, v, pattern=pattern))
    actual, expected = ours(), run(partial(_segment_attention, q, k, v, tuple(runs[0])))
    found["departure"] = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(actual, expected))
    del actual, expected
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found["seconds"] = statistics.median(_timed(ours, device) for _ in range(2 if toy else 5))
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if found["departure"] > PARITY:
        raise RuntimeError(f"documents differ from attention of each by itself: {found}")
    return found


def page(result: dict[str, Any]) -> str:
    """The same as a page in Markdown."""
    where = result["parts"].get("environment", {}).get("result", {})
    lines = [f"# GPU acceptance: {where.get('device', 'unknown device')}", ""]
    if result["toy"]:
        lines += ["Toy sizes: this shows that every part runs, and nothing about speed.", ""]
    lines += ["| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {part['outcome']} | {part['seconds']:.1f} |" for name, part in result["parts"].items()]
    for name, part in result["parts"].items():
        shown = part.get("result", part.get("error"))
        text = shown if isinstance(shown, str) else json.dumps(shown, indent=1)
        lines += ["", f"## {name}", "", "```", text, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="sizes that run anywhere in a minute")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="directory of the page and the JSON file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no further part is begun")
    arguments = parser.parse_args()
    device, toy = torch.device(arguments.device), arguments.toy
    if device.type != "cuda" and not toy:
        parser.error("there is no CUDA device: give --toy to see that everything runs")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}. pip install {' '.join(missing)}")
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    budget, dtype = Budget(arguments.seconds), torch.bfloat16
    result: dict[str, Any] = {"toy": toy, "parts": {}}

    def part(name: str, run: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        if budget.left <= 0:
            result["parts"][name] = {"outcome": "left out: no time", "seconds": 0.0}
            return None
        try:
            record = {"outcome": "ok", "result": run()}
        except Exception as error:  # noqa: BLE001 - the parts after it have their own things to say
            record = {"outcome": "FAILED", "error": f"{error}\n{traceback.format_exc()}"}
        record["seconds"] = time.monotonic() - begin
        result["parts"][name] = record
        print(f"{name}: {record['outcome']}, {record['seconds']:.1f} s", flush=True)
        return record.get("result")

    part("environment", lambda: environment(device))
    part("parity", lambda: parity(device, dtype))
    measured = part("products", lambda: products(device, dtype, toy))
    rate = measured["flops_per_second"] if measured else None
    cases = part("shapes", lambda: {n: vars(s) for n, s in shapes(device, toy).items()}) or {}
    for name in cases:
        part(f"step: {name}", lambda name=name: steps(shapes(device, toy)[name], device, dtype, rate, budget, toy))
    for name in list(cases)[:1]:
        part("waits", lambda name=name: waits(shapes(device, toy)[name], device, dtype))
    for name in list(cases)[:1]:
        part("saving", lambda name=name: saving(shapes(device, toy)[name], device, dtype))
    part("narrow weights", lambda: narrow_weights(device, toy))
    for length in (128, 256) if toy else (4096, 32768):
        part(f"documents: {length}", lambda length=length: documents(length, device, dtype, toy))
    part("tests", lambda: gpu_tests(budget, toy))

    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-acceptance-{time.strftime('%Y-%m-%d')}"
    (arguments.out / f"{stem}.json").write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    (arguments.out / f"{stem}.md").write_text(page(result), encoding="utf-8")
    failed = [name for name, record in result["parts"].items() if record["outcome"] == "FAILED"]
    print(f"{arguments.out / stem}.md: " + (f"failed: {', '.join(failed)}" if failed else "all parts ran"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

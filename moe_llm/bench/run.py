"""`moe-llm bench`: a configuration's own training step, timed on this machine.

Batches are random tokens in documents of random lengths, packed and read as in training, so that neither text nor
tokenizer is needed; the engine, the loss and the optimizer are those of training. Nothing is written but the trace.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_llm.bench.parts import PARTS, marked, seconds_by_part, span
from moe_llm.bench.products import measure_products, peak_rate, step_products, synchronize
from moe_llm.config import Config
from moe_llm.config.adversarial import AdversarialConfig
from moe_llm.data.blocks import TrainBlocks
from moe_llm.data.cache import TokenizedText
from moe_llm.data.loader import TrainLoader
from moe_llm.data.packing import Batch, PackedBlocks, model_inputs
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime, start
from moe_llm.distributed.step_loss import StepLoss, forward_passes
from moe_llm.errors import UserError
from moe_llm.model.flops import train_flops_per_token
from moe_llm.ops import native
from moe_llm.train.build import build_trained
from moe_llm.train.trainer import seed_noise

_WARM_UP, _PROFILED = 2, 2
_MEAN_DOCUMENT = 600


def bench(config: Config, *, steps: int = 5, trace: str | Path | None = None) -> dict[str, Any] | None:
    """Time `steps` training steps, profile two more, and time the step's matrix products alone.

    Returns: on the main rank the report: seconds (median of the steps), tokens_per_second, flops_per_second (of all
    ranks), parts (share of the profiled time), products (seconds alone, by part) and their share of the step; None on
    the others.

    Raises:
        UserError: no vocabulary size, teachers, perturbations or turns, a layout that does not fit the ranks, or a
            trace that cannot be written.
    """
    if config.model.vocab_size is None:
        raise UserError(
            "model.vocab_size=null leaves the embeddings' size open: "
            "add model.vocab_size=N, the number of the tokenizer's entries"
        )
    if config.distill.teachers:
        raise UserError("distill.teachers are not part of the step that is timed: add distill={}")
    if config.train.adversarial != AdversarialConfig():
        raise UserError("train.adversarial is not part of the step that is timed: add train.adversarial={}")
    _check_trace(trace)
    runtime = start(config)
    try:
        engine, _ = build_trained(config, runtime, None)
        with synthetic_loader(config, runtime, steps + _WARM_UP + _PROFILED + 1) as loader:
            step = stepper(config, engine, runtime, loader)
            seconds = [_timed(step, runtime.device) for _ in range(_WARM_UP + steps)][_WARM_UP:]
            parts = _profile(step, engine, runtime, trace if runtime.is_main else None)
            batches = next(loader)
        counts = _expert_rows(engine, batches[0].to(runtime.device))
        if not runtime.is_main:
            return None
        return _report(config, runtime, seconds, parts, batches, counts)
    finally:
        runtime.close()


def synthetic_loader(config: Config, runtime: Runtime, steps: int) -> TrainLoader:
    """Random tokens in documents of exponentially distributed length, in blocks as training reads them."""
    random = np.random.default_rng(config.run.seed)
    tokens = min(steps * config.tokens_per_step, 2**24) + 1
    lengths = 2 + random.exponential(_MEAN_DOCUMENT, size=tokens // _MEAN_DOCUMENT + 2).astype(np.int64)
    ends = np.minimum(lengths.cumsum(), tokens)
    starts = np.unique(np.concatenate([[0], ends, [tokens]]))
    text = TokenizedText(
        random.integers(0, config.model.vocab_size, tokens, dtype=np.int64), starts, np.diff(starts), tokens
    )
    blocks = PackedBlocks(text, config.data.sequence_length, config.data.isolate_documents, pad=0)
    return TrainLoader(
        TrainBlocks([blocks], None, config.run.seed),
        position=0,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        **runtime.reads,
    )


def stepper(config: Config, engine: Engine, runtime: Runtime, loader: TrainLoader) -> Callable[[], None]:
    """One step of `train_loop`, in its parts."""
    done = 0

    def step() -> None:
        nonlocal done
        with span("data"):
            batches = [batch.to(runtime.device) for batch in next(loader)]
        seed_noise(config.run.seed, done, runtime.rank)
        step_loss = StepLoss(config.model, runtime, batches)
        for i, output in enumerate(forward_passes(engine, step_loss, batches)):
            with span("loss"):
                losses = step_loss(output)
            engine.backward(losses.total, last=i == len(batches) - 1)
        with span("optimizer"):
            engine.step(config.optim.lr)
        done += 1

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - begin


def _profile(step: Callable[[], None], engine: Engine, runtime: Runtime, trace: str | Path | None) -> dict[str, float]:
    """Seconds a step by part; the trace holds the profiled steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if runtime.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with contextlib.ExitStack() as stack:
        stack.enter_context(marked(engine.model))
        stack.enter_context(native.recorded())
        step()  # the first profiled operations cost more
        profile = stack.enter_context(torch.profiler.profile(activities=activities))
        for _ in range(_PROFILED):
            step()
        synchronize(runtime.device)
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    found = seconds_by_part(profile, on_device=runtime.device.type == "cuda")
    return {part: seconds / _PROFILED for part, seconds in found.items()}


@torch.no_grad()
def _expert_rows(engine: Engine, batch: Batch) -> list[list[int]]:
    """Tokens of this rank's batch for each expert in each layer."""
    routing = engine.forward(**model_inputs(batch)).routing
    return routing.tokens_per_expert_E.int().tolist()


def _report(
    config: Config,
    runtime: Runtime,
    seconds: list[float],
    parts: dict[str, float],
    batches: list[Batch],
    counts: list[list[int]],
) -> dict[str, Any]:
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    length = config.data.sequence_length
    products = step_products(
        config.model, config.train.micro_batch_size, length, counts, batches[0].num_targets, _mean_visible(batches[0])
    )
    limits = measure_products(products, dtype, runtime.device)
    step, rounds = statistics.median(seconds), len(batches)
    bare = {part: rounds * limit.seconds for part, limit in limits.items()}
    profiled = sum(parts.values())
    return {
        "device": str(runtime.device),
        "ranks": runtime.world_size,
        "threads": torch.get_num_threads(),
        "precision": config.train.precision,
        "tokens_per_step": config.tokens_per_step,
        "seconds": step,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tokens_per_second": config.tokens_per_step / step,
        "flops_per_second": config.tokens_per_step * train_flops_per_token(config.model, length) / step,
        "peak_flops_per_second": peak_rate(dtype, runtime.device),
        "parts": {
            part: {"seconds": value * step / profiled, "share": value / profiled, "products": bare.get(part)}
            for part, value in parts.items()
        },
        "products_seconds": sum(bare.values()),
        "products_share": sum(bare.values()) / step,
    }


def _mean_visible(batch: Batch) -> int:
    """The length of the sequences in which a query sees as many keys as in this batch's documents, on average."""
    visible = batch.position_ids_BS[batch.attention_mask_BS].double() + 1
    return max(1, round(2 * visible.mean().item()) - 1)


def _check_trace(trace: str | Path | None) -> None:
    if trace is None:
        return
    folder = Path(trace).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(trace).is_dir():
        raise UserError(f"--trace {str(trace)!r} cannot be written: name a file in a directory that exists")


def format_report(report: dict[str, Any]) -> str:
    """The report as a table."""
    unit = 1e9
    lines = [
        f"{report['precision']}, {report['device']}, {report['ranks']} rank(s) of {report['threads']} thread(s): "
        f"{report['seconds'] * 1e3:.1f} ms a step ({report['fastest'] * 1e3:.1f} to {report['slowest'] * 1e3:.1f}), "
        f"{report['tokens_per_second']:,.0f} tokens/s, {report['flops_per_second'] / unit:,.0f} GFLOP/s "
        f"(2048 x 2048 product: {report['peak_flops_per_second'] / unit:,.0f})",
        "",
        f"{'part':<14} {'ms':>9} {'share':>6} {'products alone':>15}",
    ]
    for part in PARTS:
        row = report["parts"][part]
        alone = "" if row["products"] is None else f"{row['products'] * 1e3:.1f} ms"
        lines.append(f"{part:<14} {row['seconds'] * 1e3:>9.1f} {row['share']:>6.1%} {alone:>15}")
    lines += [
        "",
        f"the step's matrix products alone take {report['products_seconds'] * 1e3:.1f} ms: "
        f"{report['products_share']:.0%} of the step is the limit",
    ]
    return "\n".join(lines)

"""A plan as text, and as a configuration file."""

import os
from pathlib import Path

from moe_llm.atomic import write_atomically
from moe_llm.config import dump_config
from moe_llm.errors import UserError
from moe_llm.planner.hardware import FRAGMENTS, LINK_EFFICIENCY, RESERVED_BYTES
from moe_llm.planner.layout import held_parameters, trained_parameters
from moe_llm.planner.memory import PARTS
from moe_llm.planner.plan import Candidate, Plan, days, planned_config, words
from moe_llm.planner.time import accumulation

GIB = 2**30
_ROWS = 12


def format_plan(found: Plan) -> str:
    """The layouts as a table, and the best one's arithmetic."""
    request = found.request
    lines = [
        f"{request.gpus} GPUs of {request.memory / GIB:.1f} GiB ({request.hardware.name}) on {request.nodes} node(s); "
        f"{request.usable / GIB:.1f} GiB for tensors, after {RESERVED_BYTES / GIB:.0f} GiB for the runtime and "
        f"{FRAGMENTS:.0%} for fragments",
        f"memory and time for {_busiest(found)} times an even share of rows on the busiest rank; products at {request.mfu:.0%} of the peak "
        f"and links at {LINK_EFFICIENCY:.0%}; fused attention (assumed)",
        "",
        "  EP ZeRO micro recomputed host " + " ".join(f"{part:>11}" for part in PARTS) + "    GiB    step s     days",
    ]
    shown = _shown(found.candidates)
    lines += [_row(found, candidate) for candidate in shown]
    rest = len(found.candidates) - len(shown)
    fitting = sum(candidate.fits for candidate in found.candidates)
    lines.append(f"  and {rest} more; {fitting} of {len(found.candidates)} fit (*)")
    lines += _before_and_after(found)
    if found.best is None:
        least = found.candidates[0]
        lines += [
            "",
            f"no layout fits: the least, {words(least.layout)}, holds {least.memory.total / GIB:.1f} GiB; it needs "
            "one of",
            *(f"  - {sentence}" for sentence in found.needed),
        ]
    else:
        lines += ["", *_arithmetic(found, found.best)]
    return "\n".join(lines)


def _busiest(found: Plan) -> str:
    return f"{found.request.imbalance:g}" if found.request.loads is None else "(see below)"


def _before_and_after(found: Plan) -> list[str]:
    """The busiest rank by recorded loads, of each expert-parallel size."""
    request, lines = found.request, list[str]()
    sizes = sorted({candidate.layout.expert_parallel for candidate in found.candidates} - {1})
    for size in sizes if request.loads is not None else ():
        layout = next(c.layout for c in found.candidates if c.layout.expert_parallel == size)
        still, moved = (request.imbalance_of(layout, dynamic) for dynamic in (False, True))
        lines.append(f"  EP {size}: {still:.2f} with neighbours together, {moved:.2f} where experts have moved")
    if not lines:
        return []
    used = found.config.parallel.placement
    return [
        "",
        f"busiest rank over an even share, by the recorded loads (parallel.placement={used} is planned):",
        *lines,
    ]


def _shown(candidates: list[Candidate]) -> list[Candidate]:
    """The best of each expert-parallel size and ZeRO stage, offloaded and not, in the order given."""
    kept: dict[tuple[int, int, bool], Candidate] = {}
    for candidate in candidates:
        layout = candidate.layout
        kept.setdefault((layout.expert_parallel, layout.zero_stage, layout.offload), candidate)
    return list(kept.values())[:_ROWS]


def _row(found: Plan, candidate: Candidate) -> str:
    layout, memory = candidate.layout, candidate.memory
    sizes = " ".join(f"{memory.parts[part] / GIB:>11.1f}" for part in PARTS)
    return (
        f"{'*' if candidate.fits else ' '} {layout.expert_parallel:>2} {layout.zero_stage:>4} {layout.micro_batch:>5} "
        f"{('selective' if layout.selective else 'yes') if layout.recompute else 'no':>10} {'yes' if layout.offload else 'no':>4} {sizes} {memory.total / GIB:>6.1f} {candidate.time.total:>9.2f} "
        f"{days(found, candidate):>8.1f}"
    )


def _arithmetic(found: Plan, best: Candidate) -> list[str]:
    config, layout, time, sent = found.config, best.layout, best.time, best.traffic
    dense, expert = held_parameters(config, layout)
    trained = trained_parameters(config, layout)
    shard = trained.dense / layout.ranks + trained.expert / layout.replicas
    size = 4 if config.train.precision == "fp32" else 2
    rounds = accumulation(config, layout)
    tokens = config.tokens_per_step
    return [
        f"best: {words(layout)}; fullest moment: {best.memory.phase}",
        f"  a GPU holds {dense:,} dense and {expert:,} expert parameters ({config.model.num_local_experts} experts / "
        f"EP {layout.expert_parallel}), of {size} bytes: {size * (dense + expert) / GIB:.1f} GiB",
        f"  trained of them: {trained.dense:,.0f} dense and {trained.expert:,.0f} expert parameters"
        + (" (adapters, held besides)" if any(trained.adapters) else ""),
        f"  its share of the optimizer: dense / {layout.ranks} ranks + experts / {layout.replicas} replicas = "
        f"{shard:,.0f} parameters",
        *(
            [
                f"  host memory of each machine: {best.memory.host * min(found.request.ranks_per_node, layout.ranks) / GIB:.0f} "
                f"GiB for {'gradients' if layout.nvme else 'masters, moments and gradients'}"
                + ("" if found.request.host_memory else "; name what there is with --host-memory")
            ]
            if layout.offload
            else []
        ),
        *(
            [
                f"  disk of each machine: {best.memory.disk * min(found.request.ranks_per_node, layout.ranks) / GIB:.0f} GiB "
                f"in {config.parallel.nvme_path} for masters and moments, which memory keeps too as far as it has room"
            ]
            if layout.nvme
            else []
        ),
        f"  at the start a machine holds {best.memory.host_at_start * min(found.request.ranks_per_node, layout.ranks) / GIB:.1f} GiB "
        "of weights that are not on their GPUs yet",
        "  memory, GiB: "
        + ", ".join(f"{part} {best.memory.parts[part] / GIB:.1f}" for part in PARTS)
        + f"; in all {best.memory.total / GIB:.1f}",
        f"  a step: {tokens:,} tokens, {rounds} micro-batches of {layout.micro_batch} x "
        f"{config.data.sequence_length} tokens on each GPU",
        f"  a GPU sends in a step, GB: all-to-all {sent.all_to_all / 1e9:.1f}, gradients {sent.gradients / 1e9:.1f}, "
        f"weights {sent.weights / 1e9:.1f}",
        f"  seconds: products {time.products:.2f} + all-to-all {time.all_to_all:.2f} + gradients "
        f"{time.gradients:.2f} + weights {time.weights:.2f} + host {time.host:.2f} = {time.total:.2f}, nothing overlapped",
        f"  {config.max_steps:,} steps, {config.max_steps * tokens * config.fill:,.0f} tokens"
        + (f" in blocks that are {config.fill:.1%} full, as prepared" if config.fill < 1 else "")
        + f": {days(found, best):.1f} days, {tokens * config.fill / time.total:,.0f} tokens/s",
    ]


def check_out(path: str) -> None:
    """Refuse a file that cannot be written, before any work."""
    file = Path(path)
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {path!r} cannot be written: name a file in a directory that exists")
    if file.exists():
        raise UserError(f"--out {path!r} exists: name another file, or remove it")


def write_config(found: Plan, path: str) -> None:
    """The configuration with the best layout in it, and above it how to launch it."""
    best, request = found.best, found.request
    assert best is not None, "there is no layout to write"
    launcher = "gpu_1" if request.gpus == 1 else "gpu_8" if request.nodes == 1 else "multi_node"
    machines = (
        ""
        if request.nodes == 1
        else (f"\n#     --num_machines {request.nodes} --machine_rank RANK --main_process_ip FIRST_HOST")
    )
    head = (
        f"# {words(best.layout)}, for {request.gpus} GPUs of {request.memory / GIB:.0f} GiB on {request.nodes} "
        f"node(s): {best.memory.total / GIB:.1f} GiB of each, {best.time.total:.2f} s a step, by arithmetic\n"
        f"# (moe-llm plan).\n"
        f"# accelerate launch --config_file configs/accelerate/{launcher}.yaml --num_processes {request.gpus}"
        f"{' ' + chr(92) if machines else ''}{machines}{' ' + chr(92)}\n#     scripts/train.py {Path(path).name}\n"
    )
    write_atomically(path, head + dump_config(planned_config(found.config, best.layout)))

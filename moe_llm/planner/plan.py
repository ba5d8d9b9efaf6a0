"""`moe-llm plan`: which layouts of a run fit the GPUs, and how long the best one takes, before any are rented.

By arithmetic on the configuration, and on the share of padding where its data have been prepared: no torch, no
allocation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe_llm.config import Config
from moe_llm.config.parallel import sequence_parts_conflict
from moe_llm.data.fill import with_known_fill
from moe_llm.distributed.placement_plan import imbalance
from moe_llm.errors import UserError
from moe_llm.finetune.selection import trained_names
from moe_llm.ops.accelerators import ACCELERATORS, Accelerator
from moe_llm.planner.hardware import FRAGMENTS, MFU, RESERVED_BYTES
from moe_llm.planner.layout import Layout, held_parameters
from moe_llm.planner.memory import KERNELS, Memory, step_memory
from moe_llm.planner.time import StepTime, Traffic, accumulation, step_time, traffic

IMBALANCE = 1.5
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_MOST_GPUS = 4096
_LONG = 16384  # tokens of a sequence from which on ranks may share it


@dataclass(frozen=True)
class Request:
    """What there is. memory: bytes of one GPU. host_memory: of one machine, None where it is not known. imbalance: rows
    of the busiest rank over an even share, in memory and, since the others wait for it, in time. loads: of each layer's
    experts, as a run has recorded them, in its place."""

    gpus: int
    nodes: int
    memory: float
    hardware: Accelerator
    mfu: float = MFU
    imbalance: float = IMBALANCE
    host_memory: float | None = None
    loads: Sequence[Sequence[float]] | None = None

    def imbalance_of(self, layout: Layout, dynamic: bool) -> float:
        """That of a layout: as given or, where there are loads, by these, with experts where parallel.placement puts them."""
        if self.loads is None or layout.expert_parallel == 1:
            return self.imbalance
        return imbalance(self.loads, layout.expert_parallel, moved=dynamic)

    @property
    def ranks_per_node(self) -> int:
        return self.gpus // self.nodes

    @property
    def usable(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return max(0.0, self.memory * (1 - FRAGMENTS) - RESERVED_BYTES)


@dataclass(frozen=True)
class Candidate:
    layout: Layout
    memory: Memory
    traffic: Traffic
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class Plan:
    """candidates: all sensible layouts, those that fit first, each kind by step time. best: None if none fits, and
    then `needed` says what would do."""

    config: Config
    request: Request
    candidates: list[Candidate]
    best: Candidate | None
    needed: list[str]


def hardware_named(name: str, **given: float | None) -> Accelerator:
    """An accelerator by its name, with numbers of the user's in place of the table's where they are not None."""
    known: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return replace(ACCELERATORS[name], **known)


def plan(config: Config, request: Request) -> Plan:
    """Every sensible layout of `config` on what `request` has.

    Raises:
        UserError: no vocabulary size, GPUs that do not divide over the nodes, or a batch that does not over the GPUs.
    """
    _check(config, request)
    config = with_known_fill(config)
    candidates = [_candidate(config, request, layout) for layout in layouts(config, request.gpus)]
    candidates.sort(key=lambda c: (not c.fits, c.time.total if c.fits else c.memory.total, c.memory.total))
    best = candidates[0] if candidates[0].fits else None
    needed = [] if best else _needed(config, request, candidates)
    return Plan(config, request, candidates, best, needed)


def _check(config: Config, request: Request) -> None:
    if config.model.vocab_size is None:
        raise UserError(
            "model.vocab_size=null leaves the embeddings' size open: "
            "add model.vocab_size=N, the number of the tokenizer's entries"
        )
    trained_names(config)  # refuses what names nothing
    if config.finetune.router_guard.action == "regularise":
        raise UserError(
            "finetune.router_guard.action=regularise takes passes that plans do not count: add finetune.router_guard={}"
        )
    if config.distill.teachers:
        raise UserError("distill.teachers take memory and time that plans do not count: add distill={}")
    if config.train.adversarial.epsilon is not None:
        raise UserError("train.adversarial.epsilon takes passes that plans do not count: add train.adversarial={}")
    if request.gpus % request.nodes:
        raise UserError(
            f"--gpus {request.gpus} does not divide over --nodes {request.nodes}: give as many GPUs on every node"
        )
    shape = (config.model.num_moe_layers, config.model.num_local_experts)
    if request.loads is not None and (len(request.loads), len(request.loads[0])) != shape:
        raise UserError(
            f"--loads has {len(request.loads)} layers of {len(request.loads[0])} experts, and the configuration {shape[0]} of "
            f"{shape[1]}: name a run of this model"
        )
    batch, most = config.train.global_batch_size, max(_sequence_parallel_sizes(config, request.gpus))
    if batch % (request.gpus // most):
        above = -(-batch // request.gpus) * request.gpus
        raise UserError(
            f"train.global_batch_size={batch} does not divide over --gpus {request.gpus}: "
            f"add train.global_batch_size={above}, or give other GPUs"
        )


def layouts(config: Config, gpus: int) -> Iterator[Layout]:
    """What can be launched on so many ranks: each expert-parallel size, ZeRO stage (one, where there is nothing to
    divide), micro-batch that divides the batch, with recomputation, whole or selective, and without, the optimizer's
    tensors on the GPU or in host memory (in files, where the configuration says so); long sequences whole or shared by
    ranks."""
    nvme = config.parallel.offload_optimizer == "nvme"
    experts, batch = config.model.num_local_experts, config.train.global_batch_size
    offloads = config.parallel.gradient_dtype == "fp32"
    for size in (n for n in range(1, experts + 1) if experts % n == 0 and gpus % n == 0):
        for stage in (1, 2, 3) if gpus > 1 else (config.parallel.zero_stage,):
            for shared in _sequence_parallel_sizes(config, gpus):
                for micro in (m for m in _MICRO_BATCHES if batch % (m * (gpus // shared)) == 0):
                    for recompute, selective in ((False, False), (True, False), (True, True)):
                        # ZeRO-1 would hold whole gradients beside what is offloaded
                        for offload in (False, True) if offloads and (stage > 1 or gpus == 1) else (False,):
                            yield Layout(
                                gpus, size, stage, micro, recompute, offload, selective, shared, nvme=nvme and offload
                            )


def _sequence_parallel_sizes(config: Config, gpus: int) -> list[int]:
    """As configured; for long sequences each size that fits, where none is."""
    asked = config.parallel.sequence_parallel_size
    if asked > 1 or config.data.sequence_length < _LONG:
        return [asked] if gpus % asked == 0 else [1]
    return [size for size in (1, 2, 4, 8, 16, 32) if gpus % size == 0 and sequence_parts_conflict(config, size) is None]


def _candidate(config: Config, request: Request, layout: Layout) -> Candidate:
    busiest = request.imbalance_of(layout, config.parallel.placement == "dynamic")
    memory = step_memory(config, layout, KERNELS["cuda"], busiest)
    time = step_time(config, layout, request.hardware, request.ranks_per_node, request.mfu, busiest)
    fits = memory.total <= request.usable and _host_fits(memory, request)
    return Candidate(layout, memory, traffic(config, layout), time, fits)


def _host_fits(memory: Memory, request: Request) -> bool:
    return request.host_memory is None or memory.host_needed * request.ranks_per_node <= request.host_memory


def _needed(config: Config, request: Request, candidates: list[Candidate]) -> list[str]:
    """What would make it possible: larger GPUs, more of them, more host memory, or fewer layers."""
    gib = 2**30
    held = [c for c in candidates if _host_fits(c.memory, request)]
    found = []
    if held:
        least = min(held, key=lambda c: c.memory.total)
        memory = (least.memory.total + RESERVED_BYTES) / (1 - FRAGMENTS)
        found.append(f"{request.gpus} GPUs of {memory / gib:.0f} GiB each ({words(least.layout)})")
    more = _more_gpus(config, request)
    if more is not None:
        found.append(
            f"{more.layout.ranks} GPUs of {request.memory / gib:.0f} GiB ({words(more.layout)}: "
            f"{more.memory.total / gib:.1f} GiB)"
        )
    fitting = [c for c in candidates if c.memory.total <= request.usable]
    if fitting:
        host = min(fitting, key=lambda c: c.memory.host_needed)
        found.append(
            f"{host.memory.host_needed * request.ranks_per_node / gib:.0f} GiB of host memory in each machine "
            f"({words(host.layout)}: {host.memory.total / gib:.1f} GiB of each GPU)"
        )
    mapped = [_candidate(config, request, replace(c.layout, nvme=True)) for c in fitting if c.layout.offload]
    if mapped and not any(c.layout.nvme for c in fitting):
        least = min(mapped, key=lambda c: c.memory.host_needed)
        host_memory, disk = (n * request.ranks_per_node / gib for n in (least.memory.host_needed, least.memory.disk))
        found.append(
            f"parallel.offload_optimizer=nvme, with {host_memory:.0f} GiB of host memory and {disk:.0f} GiB of disk in each "
            f"machine ({words(least.layout)})"
        )
    layers = _fewer_layers(config, request)
    if layers:
        given = config.model.num_hidden_layers
        found.append(f"model.num_hidden_layers={layers} on the GPUs given, in place of {given}")
    return found


def _least(config: Config, request: Request) -> Candidate | None:
    found = [_candidate(config, request, layout) for layout in layouts(config, request.gpus)]
    held = [candidate for candidate in found if _host_fits(candidate.memory, request)]
    return min(held, key=lambda c: c.memory.total, default=None)


def _more_gpus(config: Config, request: Request) -> Candidate | None:
    """The least, of whole nodes like those given, on which it fits; the batch grows to divide where it must."""
    step, gpus = request.ranks_per_node, request.gpus
    while gpus < _MOST_GPUS:
        gpus = gpus * 2 if gpus >= 4 * step else gpus + step
        batch = -(-config.train.global_batch_size // gpus) * gpus
        grown = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": batch})})
        least = _least(grown, replace(request, gpus=gpus, nodes=gpus // step))
        if least is not None and least.fits:
            return least
    return None


def _fewer_layers(config: Config, request: Request) -> int:
    """The most layers that fit; 0 if not even one does."""
    low, high = 0, config.model.num_hidden_layers
    while high - low > 1:
        middle = (low + high) // 2
        shallow = config.model_copy(update={"model": config.model.model_copy(update={"num_hidden_layers": middle})})
        least = _least(shallow, request)
        low, high = (middle, high) if least is not None and least.fits else (low, middle)
    return low


def words(layout: Layout) -> str:
    again = f", sequences shared by {layout.sequence_parallel}" if layout.sequence_parallel > 1 else ""
    again += (", selective recomputation" if layout.selective else ", recomputation") if layout.recompute else ""
    again += f", optimizer {'in files' if layout.nvme else 'on the host'}" if layout.offload else ""
    return f"EP {layout.expert_parallel}, ZeRO-{layout.zero_stage}, micro-batch {layout.micro_batch}{again}"


def planned_config(config: Config, layout: Layout) -> Config:
    """The configuration with a layout written into it."""
    parallel = config.parallel.model_copy(
        update={
            "expert_parallel_size": layout.expert_parallel,
            "zero_stage": layout.zero_stage,
            "offload_optimizer": ("nvme" if layout.nvme else "cpu") if layout.offload else "none",
            "nvme_path": config.parallel.nvme_path if layout.nvme else None,
            "sequence_parallel_size": layout.sequence_parallel,
        }
    )
    train = config.train.model_copy(
        update={
            "micro_batch_size": layout.micro_batch,
            "activation_checkpointing": ("selective" if layout.selective else "full") if layout.recompute else "off",
        }
    )
    return config.model_copy(update={"parallel": parallel, "train": train})


def days(found: Plan, candidate: Candidate) -> float:
    """To the end of the run."""
    return found.config.max_steps * candidate.time.total / 86400


def as_json(found: Plan) -> dict[str, Any]:
    """All of it, sizes in bytes and times in seconds."""

    def row(candidate: Candidate) -> dict[str, Any]:
        return {
            **asdict(candidate.layout),
            "fits": candidate.fits,
            "accumulation_steps": accumulation(found.config, candidate.layout),
            "memory": {**candidate.memory.parts, "total": candidate.memory.total, "when": candidate.memory.phase},
            "host_memory": candidate.memory.host,
            "disk": candidate.memory.disk,
            "host_memory_at_start": candidate.memory.host_at_start,
            "traffic": {**asdict(candidate.traffic), "total": candidate.traffic.total},
            "seconds": {**asdict(candidate.time), "step": candidate.time.total},
            "days": days(found, candidate),
        }

    dense, expert = held_parameters(found.config, found.candidates[0].layout)
    request = asdict(found.request) | {"usable": found.request.usable}
    return {
        "request": request,
        "steps": found.config.max_steps,
        "tokens_per_step": found.config.tokens_per_step,
        "fill": found.config.fill,
        "best": row(found.best) if found.best else None,
        "needed": found.needed,
        "held_before_zero": {"dense": dense, "experts": expert},
        "candidates": [row(candidate) for candidate in found.candidates],
    }

"""Bytes that a rank sends in a step, and how long a step takes, by arithmetic and stated shares of the peaks.

Nothing is assumed to overlap: our all-to-all waits, and DeepSpeed reduces gradients as ZeRO-1 and 2 do by default.
"""

from dataclasses import dataclass

from moe_llm.config import Config
from moe_llm.model.flops import train_flops_per_token
from moe_llm.planner.hardware import LINK_EFFICIENCY, Accelerator
from moe_llm.planner.memory import Layout, held_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step."""

    all_to_all: float
    gradients: float
    weights: float

    @property
    def total(self) -> float:
        return self.all_to_all + self.gradients + self.weights


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by what they are spent on."""

    products: float
    all_to_all: float
    gradients: float
    weights: float

    @property
    def total(self) -> float:
        return self.products + self.all_to_all + self.gradients + self.weights


def accumulation(config: Config, layout: Layout) -> int:
    """Micro-batches that a rank takes in a step."""
    return config.train.global_batch_size // (layout.micro_batch * layout.ranks)


def traffic(config: Config, layout: Layout) -> Traffic:
    """What a rank sends, all-to-all (of evenly spread tokens), gradients and weights."""
    dense, expert = (_reduced(config, layout, share) for share in _groups(config, layout))
    return Traffic(_exchanged(config, layout), dense[0] + expert[0], dense[1] + expert[1])


def _groups(config: Config, layout: Layout) -> list[tuple[float, int]]:
    """(parameters, ranks that hold them) of the dense part and of the experts."""
    dense, expert = held_parameters(config, layout)
    return [(dense, layout.ranks), (expert, layout.replicas)]


def _exchanged(config: Config, layout: Layout) -> float:
    """Rows to their experts and back: twice in the forward pass, twice in the backward pass, and twice more where the
    forward pass is recomputed; of evenly spread rows the share that is for other ranks. Where weights are mixed, these
    instead: to every rank once for each of those passes, and their gradients back, in every micro-batch."""
    if layout.expert_parallel == 1:
        return 0.0
    if config.model.router.merges:
        size = 4 if config.train.precision == "fp32" else 2
        held = size * config.model.parameter_counts()["experts"] / layout.expert_parallel
        return (4 if layout.recompute else 3) * accumulation(config, layout) * (layout.expert_parallel - 1) * held
    m, tokens = config.model, config.tokens_per_step / layout.ranks
    row = m.hidden_size * (4 if config.train.precision == "fp32" else 2)
    elsewhere = 1 - 1 / layout.expert_parallel
    times = 6 if layout.recompute else 4
    return times * m.num_hidden_layers * tokens * m.num_experts_per_tok * row * elsewhere


def _reduced(config: Config, layout: Layout, group: tuple[float, int]) -> tuple[float, float]:
    """(gradients, weights) sent for parameters that `ranks` hold together.

    Gradients travel in fp32 (`communication_data_type`), by a ring (Patarasuk and Yuan 2009): (r-1)/r of them to
    reduce, as much again where every rank gets the sum. ZeRO-1 does both once a step; ZeRO-2 reduces to the owner,
    and ZeRO-3, with contiguous gradients, to all, in every micro-batch. Weights are gathered once a step, or in
    ZeRO-3 for each forward and backward pass.
    """
    parameters, ranks = group
    share, rounds = (ranks - 1) / ranks, accumulation(config, layout)
    size = 4 if config.train.precision == "fp32" else 2
    passes = {1: 2, 2: rounds, 3: 2 * rounds}[layout.zero_stage]
    gathers = 2 * rounds if layout.zero_stage == 3 else 1
    return 4 * parameters * share * passes, size * parameters * share * gathers


def step_time(config: Config, layout: Layout, hardware: Accelerator, ranks_per_node: int, mfu: float) -> StepTime:
    """Seconds of a step in which tokens spread evenly over the experts.

    Args:
        mfu: share of the peak that the products reach, exchanges not counted.
    """
    tokens = config.tokens_per_step / layout.ranks
    flops = train_flops_per_token(config.model, config.data.sequence_length) * tokens
    again = 4 / 3 if layout.recompute else 1.0  # the forward pass is a third of the step
    peak = hardware.flops / (1 if config.train.precision == "bf16" else 2)  # TF32 products run at half the rate
    seconds = {"gradients": 0.0, "weights": 0.0}
    for index, group in enumerate(_groups(config, layout)):
        # replicas of an expert are `expert_parallel` ranks apart, all ranks hold the dense part
        spread = layout.ranks if group[1] > 1 else layout.expert_parallel if index else 1
        rate = _rate(hardware, spread > ranks_per_node)
        gradients, weights = _reduced(config, layout, group)
        seconds["gradients"] += gradients / rate
        seconds["weights"] += weights / rate
    outside = max(0.0, 1 - ranks_per_node / layout.expert_parallel)
    exchanged = _exchanged(config, layout)
    return StepTime(
        products=flops * again / (peak * mfu),
        all_to_all=exchanged * outside / _rate(hardware, True) + exchanged * (1 - outside) / _rate(hardware, False),
        **seconds,
    )


def _rate(hardware: Accelerator, network: bool) -> float:
    return LINK_EFFICIENCY * (hardware.network_bandwidth if network else hardware.node_bandwidth)

"""Bytes that a rank sends in a step, and how long a step takes, by arithmetic and stated shares of the peaks.

Nothing is assumed to overlap: our all-to-all waits, and DeepSpeed reduces gradients as ZeRO-1 and 2 do by default.
"""

from dataclasses import dataclass

from moe_llm.config import Config
from moe_llm.model.flops import train_flops_per_token
from moe_llm.ops.accelerators import Accelerator
from moe_llm.planner.hardware import HOST_BANDWIDTH, LINK_EFFICIENCY, NVME_BANDWIDTH, PCIE_BANDWIDTH
from moe_llm.planner.layout import Layout, held_parameters, trained_parameters
from moe_llm.planner.memory import KERNELS, offloaded_activations


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
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.all_to_all + self.gradients + self.weights + self.host


def accumulation(config: Config, layout: Layout) -> int:
    """Micro-batches that a rank takes in a step."""
    return config.train.global_batch_size // (layout.micro_batch * layout.readers)


def traffic(config: Config, layout: Layout) -> Traffic:
    """What a rank sends, all-to-all (of evenly spread tokens), gradients and weights."""
    dense, expert = (_reduced(config, layout, group) for group in _groups(config, layout))
    return Traffic(_exchanged(config, layout), dense[0] + expert[0], dense[1] + expert[1])


def _groups(config: Config, layout: Layout) -> list[tuple[float, float, int]]:
    """(parameters, those that are trained, ranks that hold them) of the dense part and of the experts."""
    dense, expert = held_parameters(config, layout)
    trained = trained_parameters(config, layout)
    return [
        (dense + trained.adapters[0], trained.dense, layout.ranks),
        (expert + trained.adapters[1], trained.expert, layout.replicas),
    ]


def _exchanged(config: Config, layout: Layout) -> float:
    """Rows to their experts and back: twice in the forward pass, twice in the backward pass, and twice more where the
    forward pass is recomputed; of evenly spread rows the share that is for other ranks. Where weights are mixed, these
    instead: to every rank once for each of those passes, and their gradients back, in every micro-batch."""
    return _rows_exchanged(config, layout) + _heads_exchanged(config, layout)


def _heads_exchanged(config: Config, layout: Layout) -> float:
    """Where ranks share sequences: queries, keys and values to the ranks of their heads and attention's outputs back, in
    each pass."""
    shared, m = layout.sequence_parallel, config.model
    groups = max(m.kv_heads, shared)
    elements = 2 * (m.num_attention_heads + groups) * m.attention_head_dim
    tokens, size = config.tokens_per_step / layout.ranks, 4 if config.train.precision == "fp32" else 2
    passes = 3 if layout.recompute and not layout.selective else 2
    return passes * m.num_hidden_layers * tokens * elements * size * (1 - 1 / shared)


def _rows_exchanged(config: Config, layout: Layout) -> float:
    if layout.expert_parallel == 1:
        return 0.0
    if config.model.router.merges:
        size = 4 if config.train.precision == "fp32" else 2
        held = size * config.model.parameter_counts()["experts"] / layout.expert_parallel
        return (4 if layout.recompute else 3) * accumulation(config, layout) * (layout.expert_parallel - 1) * held
    m, tokens = config.model, config.tokens_per_step / layout.ranks
    row = m.hidden_size * (4 if config.train.precision == "fp32" else 2)
    elsewhere = 1 - 1 / layout.expert_parallel
    times = 6 if layout.recompute and not layout.selective else 4
    return times * m.num_moe_layers * tokens * m.num_experts_per_tok * row * elsewhere


def _reduced(config: Config, layout: Layout, group: tuple[float, float, int]) -> tuple[float, float]:
    """(gradients, weights) sent for parameters that `ranks` hold together.

    Gradients travel as `parallel.communication_dtype` says, by a ring (Patarasuk and Yuan 2009): (r-1)/r of them to
    reduce, as much again where every rank gets the sum. ZeRO-1 does both once a step; ZeRO-2 reduces to the owner,
    and ZeRO-3, with contiguous gradients, to all, in every micro-batch. Weights are gathered once a step, or in
    ZeRO-3 for each forward and backward pass.
    """
    parameters, trained, ranks = group
    share, rounds = (ranks - 1) / ranks, accumulation(config, layout)
    size = 4 if config.train.precision == "fp32" else 2
    passes = {1: 2, 2: rounds, 3: 2 * rounds}[layout.zero_stage]
    # ZeRO-3 gathers frozen weights too; ZeRO-1 and 2 those that the step has changed
    gathered = 2 * rounds * parameters if layout.zero_stage == 3 else trained
    width = 2 if config.parallel.communication_dtype == "bf16" and size == 2 else 4
    return width * trained * share * passes, size * share * gathered


def step_time(
    config: Config, layout: Layout, hardware: Accelerator, ranks_per_node: int, mfu: float, imbalance: float = 1.0
) -> StepTime:
    """Seconds of an optimizer step.

    Args:
        mfu: share of the peak that the products reach, exchanges not counted.
        imbalance: rows of the busiest rank over an even share. The other ranks wait for it in every layer, so it
            multiplies the experts' products and the exchange of rows, where experts are spread over ranks.
    """
    tokens = config.tokens_per_step / layout.ranks
    dense, experts = _operations(config, layout)
    busiest = imbalance if layout.expert_parallel > 1 and not config.model.router.merges else 1.0
    peak = hardware.flops / (1 if config.train.precision == "bf16" else 2)  # TF32 products run at half the rate
    seconds = {"gradients": 0.0, "weights": 0.0}
    for index, group in enumerate(_groups(config, layout)):
        # replicas of an expert are `expert_parallel` ranks apart, all ranks hold the dense part
        spread = layout.ranks if group[2] > 1 else layout.expert_parallel if index else 1
        rate = _rate(hardware, spread > ranks_per_node)
        gradients, weights = _reduced(config, layout, group)
        seconds["gradients"] += gradients / rate
        seconds["weights"] += weights / rate
    outside = max(0.0, 1 - ranks_per_node / layout.expert_parallel)
    exchanged = _rows_exchanged(config, layout) * busiest + _heads_exchanged(config, layout)
    return StepTime(
        products=(dense + experts * busiest) * tokens / (peak * mfu),
        all_to_all=exchanged * outside / _rate(hardware, True) + exchanged * (1 - outside) / _rate(hardware, False),
        host=_host_seconds(config, layout, ranks_per_node),
        **seconds,
    )


def _operations(config: Config, layout: Layout) -> tuple[float, float]:
    """Floating-point operations a token, of all but the experts and of the experts.

    Of the six per parameter two are the weight's gradient, which frozen weights have not; recomputation repeats the
    two of the forward pass.
    """
    m = config.model
    whole = train_flops_per_token(m, config.data.sequence_length)
    experts = 6.0 * m.num_moe_layers * m.router.active_experts(m) * m.expert_parameters
    held = held_parameters(config, layout)
    trained = trained_parameters(config, layout)
    again = 2 if layout.recompute else 0
    parts = []
    for operations, share in (
        (whole - experts, _share(trained.dense - trained.adapters[0], held[0])),
        (experts, _share(trained.expert - trained.adapters[1], held[1])),
    ):
        parts.append(operations * (4 + 2 * share + again) / 6)
    return parts[0], parts[1]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _host_seconds(config: Config, layout: Layout, ranks_per_node: int) -> float:
    """The optimizer's update in host memory, with gradients on their way there in every micro-batch and weights back.

    AdamW reads 16 bytes a parameter and writes 12, and the processors' memory is the bound (Ren et al. 2021,
    ZeRO-Offload, section 5). In files it is the drive, which reads and writes all of them but the gradients.
    """
    activations = _activation_seconds(config, layout)
    if not layout.offload:
        return activations
    trained = trained_parameters(config, layout)
    shard = trained.dense / layout.ranks + trained.expert / layout.replicas
    size = 4 if config.train.precision == "fp32" else 2
    moved = size * shard * (accumulation(config, layout) + 1) / (PCIE_BANDWIDTH * LINK_EFFICIENCY)
    together = min(ranks_per_node, layout.ranks)
    updated = 24 * shard / NVME_BANDWIDTH if layout.nvme else 28 * shard / HOST_BANDWIDTH
    return activations + moved + updated * together


def _activation_seconds(config: Config, layout: Layout) -> float:
    """What layers keep for the backward pass, to the host and back. How much of it
    computation hides is not known, so that all of it counts."""
    if not config.train.activation_offload:
        return 0.0
    held = offloaded_activations(config, layout, KERNELS["cuda"])
    return 2 * held * accumulation(config, layout) / (PCIE_BANDWIDTH * LINK_EFFICIENCY)


def _rate(hardware: Accelerator, network: bool) -> float:
    return LINK_EFFICIENCY * (hardware.network_bandwidth if network else hardware.node_bandwidth)

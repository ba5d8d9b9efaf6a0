"""How a run is spread over ranks, and which parameters a rank then holds and trains."""

import math
from dataclasses import dataclass, field
from functools import lru_cache

from moe_llm.config import Config
from moe_llm.families.hf import is_expert
from moe_llm.finetune.selection import trained_names
from moe_llm.finetune.targets import adapter_shapes, part_of, whole_shapes


@dataclass(frozen=True)
class Layout:
    """How a run is spread: what `plan` varies. ranks: of the whole run."""

    ranks: int
    expert_parallel: int
    zero_stage: int
    micro_batch: int
    recompute: bool
    offload: bool = False  # the optimizer's tensors in host memory
    selective: bool = False  # with recompute: all but attention and what exchanges brought
    sequence_parallel: int = 1  # ranks that share each sequence
    nvme: bool = False  # with offload: in files of `parallel.nvme_path`

    @property
    def readers(self) -> int:
        """Ranks, or groups of them, that read blocks of their own."""
        return self.ranks // self.sequence_parallel

    @property
    def replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks // self.expert_parallel


def layout_of(config: Config, ranks: int) -> Layout:
    """The layout that a configuration itself asks for."""
    return Layout(
        ranks,
        config.parallel.expert_parallel_size,
        config.parallel.zero_stage,
        config.train.micro_batch_size,
        config.train.recomputes,
        config.parallel.offload_optimizer != "none",
        config.train.activation_checkpointing == "selective",
        config.parallel.sequence_parallel_size,
        config.parallel.offload_optimizer == "nvme",
    )


class _This:
    """A configuration as a key, by identity: it is frozen, and its lists have no hash."""

    def __init__(self, config: Config):
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _This) and self.config is other.config


def held_parameters(config: Config, layout: Layout) -> tuple[int, int]:
    """(dense, expert) parameters of one rank, before ZeRO."""
    return _held_parameters(_This(config), layout.expert_parallel)


@lru_cache(maxsize=16)
def _held_parameters(this: _This, expert_parallel: int) -> tuple[int, int]:
    model = this.config.model
    counts = model.parameter_counts()
    held = model.num_moe_layers * model.held_expert_parameters(expert_parallel)
    return sum(counts.values()) - counts["experts"], held


@dataclass(frozen=True)
class Trained:
    """Parameters of one rank that have gradients and optimizer tensors, before ZeRO: dense and expert ones; of one
    layer's experts and of one layer's dense part; of the head and of the embeddings. adapters: those among them that
    are held besides the model's own parameters (dense, expert)."""

    dense: float
    expert: float
    layer_dense: float
    layer_experts: float
    head: float
    embeddings: float
    adapters: tuple[float, float] = field(default=(0.0, 0.0))

    @property
    def total(self) -> float:
        return self.dense + self.expert


def trained_parameters(config: Config, layout: Layout) -> Trained:
    """What `finetune` leaves to train. Where only some experts are (`finetune.experts`), stacked tensors are trained
    whole, as the engine does it."""
    return _trained_parameters(_This(config), layout.expert_parallel)


@lru_cache(maxsize=16)  # every layout of a plan asks for it several times
def _trained_parameters(this: _This, expert_parallel: int) -> Trained:
    config = this.config
    adapters = config.finetune.lora.rank is not None
    shapes = adapter_shapes(config) if adapters else whole_shapes(config)
    counts = dict.fromkeys(("dense", "expert", "head", "embeddings"), 0.0)
    for name in trained_names(config):
        count = math.prod(shapes[name])
        if is_expert(name):
            counts["expert"] += count / expert_parallel
            continue
        counts["dense"] += count
        part = part_of(name)
        if part in ("lm_head", "embed_tokens"):
            counts["head" if part == "lm_head" else "embeddings"] += count
    model = config.model  # the rank that has the widest experts
    counts["expert"] *= model.held_expert_parameters(expert_parallel) * expert_parallel
    counts["expert"] /= model.held_expert_parameters(1)
    layers, of_layers = config.model.num_hidden_layers, counts["dense"] - counts["head"] - counts["embeddings"]
    return Trained(
        counts["dense"],
        counts["expert"],
        of_layers / layers,
        counts["expert"] / config.model.num_moe_layers,
        counts["head"],
        counts["embeddings"],
        (counts["dense"], counts["expert"]) if adapters else (0.0, 0.0),
    )

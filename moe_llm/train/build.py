"""The model under its engine, initialised from the seed, from `model.init_from` or from a checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moe_llm.checkpoint.digests import DamagedCheckpoint
from moe_llm.checkpoint.ranks import together
from moe_llm.checkpoint.state import load_checkpoint, read_trainer_state
from moe_llm.config import Config
from moe_llm.distributed.engine import DeepSpeedEngine, Engine, Fill, build_engine, shard_experts
from moe_llm.distributed.mapped_state import MappedFiles
from moe_llm.distributed.runtime import Runtime
from moe_llm.finetune.freeze import freeze
from moe_llm.finetune.init_from import load_origin
from moe_llm.finetune.lora import adapter_initialiser, add_adapters
from moe_llm.model.adapters import is_factor, own_name
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import build_blank, build_model, build_without_storage, initialiser
from moe_llm.model.quantized import quantize_experts
from moe_llm.train.optim import build_optimizer, groups_by_part, parameter_groups
from moe_llm.train.position import Position


def build_trained(
    config: Config,
    runtime: Runtime,
    source: Path | None,
    instead: Callable[[Path, DamagedCheckpoint], Path] | None = None,
) -> tuple[Engine, Position]:
    """The model under its engine, initialised from the seed or restored from a checkpoint at any layout.

    instead: gives another checkpoint in place of one that was found to be damaged; None: that is raised.
    """
    model, fill = _build_model(config, runtime)
    add_adapters(model, config)
    if fill is not None:
        fill = _with_adapters(fill, model, config)
    freeze(model, config)
    if config.finetune.quantize_frozen is not None:
        quantize_experts(model, config.finetune.quantize_frozen)
    optim = config.optim
    groups = groups_by_part(model, parameter_groups(model, optim.weight_decay, optim.name), config)
    engine = build_engine(model, runtime, config, groups, lambda g: build_optimizer(g, optim), fill)
    if config.parallel.nvme_path is not None:
        assert isinstance(engine, DeepSpeedEngine), "offloading engages DeepSpeed"
        together(engine, partial(engine.map_to_files, MappedFiles(config.parallel.nvme_path)))
    if config.model.init_from is not None and (source is None or config.finetune.lora.rank is not None):
        load_origin(engine, config.model)
    while source is not None:
        try:
            return engine, restore(engine, source, hashes=False)
        except DamagedCheckpoint as error:
            if instead is None:
                raise
            source = instead(source, error)
    if config.train.adversarial.router_every is not None:
        engine.make_optimizer_state(0)  # what has to wait for its turn has it in checkpoints before that
    return engine, Position()


def _build_model(config: Config, runtime: Runtime) -> tuple[MoEDecoder, Fill | None]:
    """With this rank's experts, in the dtype that it will be held in; without values where these are to come from
    elsewhere. Where ZeRO-3 shares the parameters out, it has no storage, and with it comes what fills one of them."""

    def keep_own(model: MoEDecoder) -> None:
        shard_experts(model, config.expert_range(runtime.rank))

    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    if runtime.deepspeed and config.parallel.zero_stage == 3:
        model = build_without_storage(config.model, dtype, prepare=keep_own)
        seeded = config.model.init_from is None
        return model, initialiser(model, config.run.seed) if seeded else lambda name, parameter: None
    if config.model.init_from is None:
        return build_model(config.model, config.run.seed, dtype=dtype, prepare=keep_own), None
    return build_blank(config.model, dtype, prepare=keep_own), None


def _with_adapters(fill: Fill, model: MoEDecoder, config: Config) -> Fill:
    """The same for a model whose modules may be wrapped by adapters, and for their factors."""
    factors = adapter_initialiser(model, config.run.seed)

    def fill_any(name: str, parameter: torch.Tensor) -> None:
        (factors if is_factor(own_name(name)) else fill)(own_name(name), parameter)

    return fill_any


def restore(engine: Engine, source: Path, *, hashes: bool) -> Position:
    """Give the engine a checkpoint's weights and optimizer tensors, whatever it has done before. Collective."""
    with engine.weights_for_use():  # those are what a checkpoint holds
        engine.make_optimizer_state(Position(**read_trainer_state(source)).updates)
        return Position(**load_checkpoint(source, engine, hashes=hashes))

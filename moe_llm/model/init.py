"""All weight initialisation."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_llm.config import ModelConfig
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.moe.experts import Experts
from moe_llm.model.moe.router import Router


def initialiser(model: MoEDecoder, seed: int) -> Callable[[str, torch.Tensor], None]:
    """What fills a parameter of this name with its initial values: see `init_weights`. The model may be without storage."""
    config = model.config
    residual = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    first_expert = {name: module.first_expert for name, module in model.named_modules() if isinstance(module, Experts)}
    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
    zero = {f"{name}.{leaf}" for name, router in routers for leaf in router.zero_parameters}
    gains = {f"{name}.{leaf}": gain for name, router in routers for leaf, gain in router.gains.items()}

    @torch.no_grad()
    def fill(name: str, parameter: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        if name in zero or name.endswith((".bias", "_bias", ".sinks")):
            parameter.zero_()
            return
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            return
        writes = leaf == "down_proj" or owner.endswith(("o_proj", "down_proj"))
        std = residual if writes else config.initializer_range
        if name in gains:
            std = gains[name] * math.sqrt(2 / sum(parameter.shape))
        if owner in first_expert:
            for local, expert in enumerate(parameter):
                _fill_normal(expert, std, f"{seed}/{name}/{first_expert[owner] + local}")
        else:
            _fill_normal(parameter, std, f"{seed}/{name}")

    return fill


def init_weights(model: MoEDecoder, seed: int) -> None:
    """Normal weights of deviation `initializer_range`; those that write into the residual stream are divided by
    sqrt(2 * layers) (Radford et al. 2019); norms are one and biases of attention zero; routers have some that are zero, as are their buffers, and
    some of a deviation that keeps a vector's length (Glorot and Bengio 2010).

    Every tensor, and every expert, draws from a generator of its own, seeded by (seed, name, expert): a rank that
    holds some of the experts gets what one process that holds them all would get.
    """
    fill = initialiser(model, seed)
    for name, parameter in model.named_parameters():
        fill(name, parameter)


def _fill_normal(tensor: torch.Tensor, std: float, key: str) -> None:
    """Fill from a CPU generator seeded by the key: the same values on every device and in every dtype."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))


def build_model(
    config: ModelConfig,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[MoEDecoder], None] = lambda model: None,
) -> MoEDecoder:
    """An initialised model on the CPU. `prepare` sees it while it has no storage yet, to shard it.

    dtype: bf16 holds what fp32 values are rounded to.
    """
    model = build_blank(config, dtype, prepare=prepare)
    init_weights(model, seed)
    return model


def build_blank(
    config: ModelConfig, dtype: torch.dtype, *, prepare: Callable[[MoEDecoder], None] = lambda model: None
) -> MoEDecoder:
    """The same without values, for weights that are still to come."""
    model = build_without_storage(config, dtype, prepare=prepare)
    materialize(model)
    return model


def build_without_storage(
    config: ModelConfig, dtype: torch.dtype, *, prepare: Callable[[MoEDecoder], None] = lambda model: None
) -> MoEDecoder:
    """The same on the meta device: `give_storage` makes its parameters real, one by one."""
    with torch.device("meta"):
        model = MoEDecoder(config).to(dtype)
    prepare(model)
    model.tie_weights()
    return model


def give_storage(parameter: nn.Parameter) -> None:
    """Uninitialised storage on the CPU; it stays the same object."""
    real = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
    vars(real).update(vars(parameter))
    torch.utils.swap_tensors(parameter, real)


def give_buffers_storage(model: nn.Module) -> None:
    """Zeros on the CPU in place of buffers without storage."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.zeros_like(buffer, device="cpu"))


def materialize(model: Any) -> None:
    """Give a model on the meta device uninitialised storage on the CPU, ties kept; buffers begin at zero."""
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    model.tie_weights()

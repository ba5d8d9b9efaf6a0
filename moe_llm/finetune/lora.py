"""Put low-rank adapters into a built model: PEFT's into attention, ours into experts and routers.

PEFT's own way with stacked experts (`target_parameters`) is not taken: at every forward it makes W + scale * B A of all
experts of a layer, as large as the layer's experts, which the products then keep for the backward pass, and a gradient
of the same size, so that nothing would be saved; its factors of all experts lie in one matrix, which expert parallelism
cannot cut by rows; and it takes no dropout. The maths is the same (a test compares the two).
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_llm.config import Config
from moe_llm.families.hf import expert_of
from moe_llm.finetune.targets import adapted_names, is_attention, require_peft
from moe_llm.model.adapters import is_factor, own_name
from moe_llm.model.moe.experts import Experts


def add_adapters(model: nn.Module, config: Config) -> None:
    """Give the model its adapters, which add nothing yet; does nothing without `finetune.lora.rank`.

    Args:
        model: fp32 or bf16, on the CPU or without storage (its adapters' values then come by `adapter_initialiser`), with
            all experts or some; before it is frozen and the engine is built.

    Raises:
        UserError: as `adapted_names`.
    """
    lora = config.finetune.lora
    if lora.rank is None:
        return
    held = {name for name, _ in model.named_parameters()}  # of experts with tensors of their own, those of this rank
    names = [name for name in adapted_names(config) if name in held or expert_of(name) is None]
    attention = [name.removesuffix(".weight") for name in names if is_attention(name)]
    if attention:
        _wrap(model, attention, config)
    for name in names:
        if not is_attention(name):
            owner, _, leaf = name.rpartition(".")
            adapted: Any = model.get_submodule(owner)
            adapted.adapt(leaf, lora.rank, lora.scale, lora.dropout)
    fill = adapter_initialiser(model, config.run.seed)
    for name, parameter in model.named_parameters():
        if is_factor(own_name(name)) and not parameter.is_meta:
            fill(own_name(name), parameter)


def _wrap(model: nn.Module, modules: list[str], config: Config) -> None:
    require_peft(config)
    from peft import LoraConfig, inject_adapter_in_model

    lora = config.finetune.lora
    assert lora.rank is not None, "only a run with adapters is asked"
    alpha: Any = lora.scale * lora.rank  # PEFT takes fractions too
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=modules, bias="none")
    inject_adapter_in_model(settings, model)


def adapter_initialiser(model: nn.Module, seed: int) -> Callable[[str, torch.Tensor], None]:
    """What fills the factor of this name (PEFT's wrappers taken off) with its initial values: A uniform within
    1 / sqrt(columns), as PEFT does it, B zero. Each A, and each expert's, draws from a generator of its own, so that every
    layout of ranks begins with the same. The model may be without storage."""
    first = {name: module.first_expert for name, module in model.named_modules() if isinstance(module, Experts)}

    @torch.no_grad()
    def fill(name: str, factor: torch.Tensor) -> None:
        if "lora_B" in name:
            factor.zero_()
            return
        owner = name.rpartition(".")[0]
        if owner not in first:
            _fill_uniform(factor, f"{seed}/{name}")
            return
        for local, expert in enumerate(factor):
            _fill_uniform(expert, f"{seed}/{name}/{first[owner] + local}")

    return fill


def _fill_uniform(tensor: torch.Tensor, key: str) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
    bound = 1 / math.sqrt(tensor.shape[-1])
    tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))

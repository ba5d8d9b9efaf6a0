"""Low-rank adapters beside frozen weights (Hu et al. 2021): W x + scale * B A x, by name.

Attention's are PEFT's (`finetune.lora`), whose wrappers put words of their own into names; experts and routers have two
more parameters in their own modules, so that ZeRO-3 gathers them with the weights that they belong to.
This file needs no torch.
"""

import re

_WRAPPED = re.compile(r"\.lora_([AB])\.default\.")
_FACTOR = re.compile(r".*(\.lora_[AB]\.weight|_lora_[AB])")


def own_name(name: str) -> str:
    """A parameter's name as it is without PEFT's wrappers; of a factor, as PEFT stores it."""
    return _WRAPPED.sub(r".lora_\1.", name.replace(".base_layer.", "."))


def factors_of(name: str) -> tuple[str, str]:
    """The names of A and B of a weight."""
    if ".self_attn." in name:
        stem = name.removesuffix(".weight")
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    return f"{name}_lora_A", f"{name}_lora_B"


def is_factor(name: str) -> bool:
    """Whether a parameter is a low-rank factor."""
    return _FACTOR.fullmatch(name) is not None

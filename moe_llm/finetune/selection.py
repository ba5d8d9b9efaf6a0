"""What of a model is trained, by the names of its parameters alone: `finetune.trainable` and `finetune.experts`.

This file needs no torch.
"""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

from moe_llm.config import Config
from moe_llm.errors import UserError, require_package
from moe_llm.families.hf import is_expert, is_router
from moe_llm.finetune.targets import adapter_shapes, describe_adapters, is_attention, part_of, whole_shapes

_PARTS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "experts": is_expert,
    "router": is_router,
    "attention": is_attention,
}


def trained_names(config: Config) -> list[str]:
    """The parameters that are trained, in the order of the model.

    Raises:
        UserError: a pattern that matches nothing, nothing left to train, or an expert that does not exist; of adapters,
            as `adapter_shapes`.
    """
    if config.finetune.lora.rank is not None:
        _check_packed(config, [])
        return list(adapter_shapes(config))
    names, chosen = list(whole_shapes(config)), config.finetune.trainable
    if isinstance(chosen, str):
        trained = [name for name in names if _PARTS[chosen](name)]
    else:
        for pattern in chosen:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"finetune.trainable={pattern!r} matches no parameter: patterns are over whole names such as "
                    f"{', '.join(dict.fromkeys(names[len(names) // 2 - 1 :][:3]))}"
                )
        trained = [name for name in names if any(fnmatchcase(name, pattern) for pattern in chosen)]
    if config.finetune.router_guard.action == "freeze":
        trained = [name for name in trained if not is_router(name)]
        if not trained:
            raise UserError(
                f"finetune.router_guard.action=freeze leaves nothing to train of finetune.trainable={chosen!r}: "
                "train other parts, or use another action"
            )
    _check_experts(config, trained)
    _check_packed(config, trained)
    return trained


def _check_packed(config: Config, trained: list[str]) -> None:
    kind, what = config.finetune.quantize_frozen, None
    if kind is None:
        return
    if any(is_expert(name) for name in trained):
        what = f"finetune.trainable={config.finetune.trainable!r} trains experts: train other parts, or use lora"
    elif config.parallel.zero_stage == 3:
        what = "parallel.zero_stage=3 cuts weights up among ranks: use 1 or 2"
    elif config.parallel.placement == "dynamic":
        what = "parallel.placement=dynamic moves weights whole: use static"
    elif config.model.router.merges:
        what = f"model.router.type={config.model.router.type} mixes weights: use another router"
    if what is not None:
        raise UserError(f"finetune.quantize_frozen={kind} packs experts, and {what}")
    require_package("bitsandbytes", f"finetune.quantize_frozen={kind}")


def _check_experts(config: Config, trained: list[str]) -> None:
    chosen, experts = config.finetune.experts, config.model.num_local_experts
    if chosen is None:
        return
    if config.model.single_expert_sizes is not None:
        key = "expert_sizes" if config.model.expert_sizes is not None else "expert_activations"
        raise UserError(
            f"finetune.experts={chosen} does not go with model.{key}: name them in finetune.trainable, as in "
            "'*.experts.0.*'"
        )
    for expert in chosen:
        if not 0 <= expert < experts:
            raise UserError(
                f"finetune.experts={chosen} names expert {expert}, and model.num_local_experts={experts}: "
                f"use indices from 0 to {experts - 1}"
            )
    if not any(map(is_expert, trained)):
        raise UserError(
            f"finetune.experts={chosen} leaves nothing to train of finetune.trainable={config.finetune.trainable!r}, which "
            "trains no experts: remove it, or train experts"
        )


def describe(config: Config) -> str:
    """One sentence: what is trained, and how many parameters that is."""
    if config.finetune.lora.rank is not None:
        return describe_adapters(config)
    shapes, trained = whole_shapes(config), trained_names(config)
    chosen, model = config.finetune.experts, config.model
    counts: dict[str, int] = {}
    for name in trained:
        count = math.prod(shapes[name])
        if chosen is not None and is_expert(name):
            count = count // model.num_local_experts * len(set(chosen))
        counts[part_of(name)] = counts.get(part_of(name), 0) + count
    told = []
    for part, count in counts.items():
        only = "" if part != "experts" or chosen is None else f" {', '.join(map(str, sorted(set(chosen))))}"
        told.append(f"{part}{only} ({count:,})")
    total = sum(math.prod(shape) for shape in shapes.values())
    number = sum(counts.values())
    return (
        f"training {', '.join(told)}: {number:,} of {total:,} parameters ({number / total:.2%}) in {len(trained)} "
        f"of {len(shapes)} tensors; all else stays as it is"
    )

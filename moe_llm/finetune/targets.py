"""Which weights get low-rank adapters, by name alone: `finetune.lora.targets`. This file needs no torch."""

import importlib.util
import math
from fnmatch import fnmatchcase
from functools import lru_cache

from moe_llm.config import Config
from moe_llm.errors import UserError
from moe_llm.families.hf import is_expert, is_router, parameter_shapes
from moe_llm.model.adapters import factors_of


def is_attention(name: str) -> bool:
    """Whether an in-memory parameter is attention's: a projection, its bias, or a norm of queries or keys."""
    return ".self_attn." in name


def is_projection(name: str) -> bool:
    """Whether an in-memory parameter is the matrix of a projection of attention."""
    return is_attention(name) and name.endswith(("_proj.weight", "_with_mqa.weight"))


_TARGETS = {
    "attention": is_projection,
    "experts": lambda name: is_expert(name) and not name.endswith("_bias"),
    "router": lambda name: is_router(name) and not name.endswith(".bias"),
}


@lru_cache(maxsize=1 << 16)
def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, in the words of `moe-llm params`."""
    if name.startswith("lm_head."):
        return "lm_head"
    if "embed_tokens" in name:
        return "embed_tokens"
    kinds = {
        "experts": is_expert(name),
        "router": is_router(name),
        "attention": is_attention(name),
        "shared_experts": ".mlp.shared_expert" in name,
        "dense_mlp": ".mlp." in name,
    }
    return next((part for part, is_it in kinds.items() if is_it), "norms")


def whole_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model without adapters; the vocabulary counts as 1 where it is not resolved yet."""
    model = config.model
    if model.vocab_size is None:  # no name depends on it
        model = model.model_copy(update={"vocab_size": 1})
    return parameter_shapes(model)


def adapted_names(config: Config) -> list[str]:
    """The weights that get adapters, in the order of the model.

    Raises:
        UserError: a target that is no part of the model and matches no parameter, one that matches what cannot have
            adapters, or a rank above what a target has rows or columns.
    """
    shapes, chosen = whole_shapes(config), config.finetune.lora.targets
    adapted = set()
    for target in chosen:
        matches = _TARGETS.get(target, lambda name, pattern=target: fnmatchcase(name, pattern))
        found = [name for name in shapes if matches(name)]
        if not found:
            raise UserError(
                f"finetune.lora.targets={target!r} is no part of the model and matches no parameter: use "
                f"{', '.join(_TARGETS)} or patterns over whole names such as model.layers.0.self_attn.q_proj.weight"
            )
        for name in found:
            if not any(is_it(name) for is_it in _TARGETS.values()):
                raise UserError(
                    f"finetune.lora.targets={target!r} matches {name}, for which there are no adapters: name weights "
                    f"of {', '.join(_TARGETS)} alone"
                )
        adapted |= set(found)
    names = [name for name in shapes if name in adapted]
    _check_fit(config, {name: shapes[name] for name in names})
    return names


def _check_fit(config: Config, shapes: dict[str, tuple[int, ...]]) -> None:
    rank, routers = config.finetune.lora.rank, [name for name in shapes if is_router(name)]
    assert rank is not None, "only a run with adapters is asked"
    for name, shape in shapes.items():
        if rank > min(shape[-2:]):
            raise UserError(
                f"finetune.lora.rank={rank} is more than the {min(shape[-2:])} rows or columns of {name}: lower the "
                "rank, or take that out of finetune.lora.targets"
            )
    if routers and config.finetune.router_guard.action == "freeze":
        raise UserError(
            f"finetune.router_guard.action=freeze contradicts finetune.lora.targets={config.finetune.lora.targets}, "
            "which names routers: remove one of them"
        )
    if routers and config.model.router.type != "mixtral":
        raise UserError(
            f"finetune.lora.targets={config.finetune.lora.targets} names routers, and those of "
            f"model.router.type={config.model.router.type} have no adapters: leave them out"
        )
    if config.model.router.merges and any(is_expert(name) for name in shapes):
        raise UserError(
            f"finetune.lora.targets={config.finetune.lora.targets} names experts, and "
            f"model.router.type={config.model.router.type} mixes their weights, which adapters are no part of: leave "
            "them out"
        )


def adapter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every low-rank factor and its shape over all ranks: A (rank, columns) and B (rows, rank), by expert for experts.

    Raises:
        UserError: as `adapted_names`.
    """
    shapes, rank = whole_shapes(config), config.finetune.lora.rank
    assert rank is not None, "only a run with adapters is asked"
    factors: dict[str, tuple[int, ...]] = {}
    for name in adapted_names(config):
        *experts, rows, columns = shapes[name]
        a, b = factors_of(name)
        factors |= {a: (*experts, rank, columns), b: (*experts, rows, rank)}
    return factors


def describe_adapters(config: Config) -> str:
    """One sentence: which adapters are trained, and how many parameters that is."""
    counts: dict[str, int] = {}
    for name, shape in adapter_shapes(config).items():
        counts[part_of(name)] = counts.get(part_of(name), 0) + math.prod(shape)
    told = ", ".join(f"{part} ({count:,})" for part, count in counts.items())
    number, total = sum(counts.values()), sum(map(math.prod, whole_shapes(config).values()))
    lora = config.finetune.lora
    return (
        f"training adapters of rank {lora.rank}, times {lora.scale:g}, of {told}: {number:,} parameters beside the "
        f"model's {total:,} ({number / total:.2%}), which all stay as they are; checkpoints have them merged"
    )


def check_lora(config: Config) -> None:
    """Refuse adapters without a base, or without the package that has attention's.

    Raises:
        UserError: one sentence; also as `adapted_names`.
    """
    lora = config.finetune.lora
    if lora.rank is None:
        return
    if config.model.init_from is None:
        raise UserError(f"finetune.lora.rank={lora.rank} has no base to adapt: set model.init_from")
    if any(map(is_attention, adapted_names(config))):
        require_peft(config)


def require_peft(config: Config) -> None:
    """Raises a UserError where the package is not installed that attention's adapters are of."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"finetune.lora.targets={config.finetune.lora.targets} needs the package peft for attention, which is not "
            "installed: pip install peft, or name experts alone"
        )

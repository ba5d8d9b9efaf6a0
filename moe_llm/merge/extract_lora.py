"""The difference between a fine-tune and its base as low-rank adapters, in PEFT's files.

Of each matrix delta = U S V the r largest singular values are kept: B = U sqrt(S), A = sqrt(S) V, which of all matrices of
rank r is nearest to it (Eckart and Young 1936). What is no matrix (norms), and embeddings and the head, is stored whole
where it has changed. Experts, which are stacked, go through PEFT's `target_parameters`, each with factors of its own.
Dimensions: r rank, I columns, O rows, E experts.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_llm.checkpoint.manifest import write_json
from moe_llm.data.files import publish
from moe_llm.errors import UserError
from moe_llm.merge.models import EMBEDDING, HEAD, Model, check_alike
from moe_llm.merge.write import check_output
from moe_llm.progress import tracked

_STACKED = ("gate_up_proj", "down_proj")
_EXPERTS = re.compile(rf"(.*\.mlp\.experts)\.({'|'.join(_STACKED)})")


@dataclass
class _Adapter:
    """tensors: by PEFT's names. ranks: of each module that has factors. parameters: stacked ones that have."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)


def extract_lora(
    base: str,
    tuned: str,
    out: str | Path,
    *,
    rank: int = 128,
    sv_epsilon: float = 0.0,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
) -> dict[str, float]:
    """Write `out/adapter_model.safetensors` and `out/adapter_config.json`.

    Args:
        rank: at most, of each matrix.
        sv_epsilon: singular values up to this are left out, but for the largest.
        include, exclude: regular expressions; a tensor whose name one of them finds in it is taken, or left out.

    Returns:
        Of each matrix the share of the difference (Frobenius norm) that the adapter leaves out; 0 where there is none.

    Raises:
        UserError: patterns that take nothing, models that differ in more than values, a bias that has changed, or an output that is in the way.
    """
    out = Path(out)
    check_output(out)
    models = [Model(base), Model(tuned)]
    taken = _taken(models, include or [], exclude or [])
    adapter, left_out = _Adapter(), {}
    names = [name for name in models[0].shapes if name != HEAD or not models[0].tied]
    if not any(map(taken, names)):
        raise UserError(
            f"include={include or []} and exclude={exclude or []} leave no tensor of {base}: write patterns of names such as "
            f"{names[-1]!r}"
        )
    changed = {name for name in names if taken(name) and not torch.equal(*(_read(model, name) for model in models))}
    for name in tracked(names, "factorising"):
        shape = models[0].shapes[name]
        if name.endswith(".bias"):
            if name in changed:
                raise UserError(
                    f"{name} differs between {base} and {tuned}, and adapters have no bias: use moe-llm merge"
                )
        elif name in (EMBEDDING, HEAD) or len(shape) == 1:
            if any(_leaf(other) == _leaf(name) for other in changed):
                adapter.whole.add(_leaf(name))
                adapter.tensors[f"base_model.model.{name}"] = _read(models[1], name)
        elif taken(name):
            before, after = (_read(model, name) for model in models)
            left_out[name] = _add(adapter, name, after - before, rank, sv_epsilon)
    with publish(out, "output") as temporary:
        save_file(adapter.tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", _configuration(adapter, str(models[0].directory)))
    return left_out


def low_rank(delta_OI: Tensor, rank: int, sv_epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) whose product is nearest to `delta_OI`, fp32."""
    u, s, vh = torch.linalg.svd(delta_OI.float(), full_matrices=False)
    kept = min(rank, len(s))
    if sv_epsilon:
        kept = max(1, min(kept, int((s > sv_epsilon).sum())))
    root = s[:kept].sqrt()
    return root[:, None] * vh[:kept], u[:, :kept] * root


def _add(adapter: _Adapter, name: str, delta: Tensor, rank: int, sv_epsilon: float) -> float:
    """Add the factors of one tensor, and return the share of it that they leave out."""
    match = _EXPERTS.fullmatch(name)
    if match is None:
        module = name.removesuffix(".weight")
        prefix = f"base_model.model.{module}"
        a, b = low_rank(delta, rank, sv_epsilon)
        if module.endswith(".mlp.gate"):  # to PEFT a parameter, as stacked experts are
            adapter.parameters.add(".".join(name.split(".")[3:]))
            a, b = _filled(a, rank), _filled(b.T, rank).T
        made, adapter.ranks[module] = b @ a, len(a)
    else:
        # PEFT's parameters have one rank, and what an expert has less is filled up with zeros
        pairs = [low_rank(expert, rank) for expert in delta]
        a_ErI = torch.stack([_filled(a, rank) for a, _ in pairs])
        b_EOr = torch.stack([_filled(b.T, rank).T for _, b in pairs])
        made, adapter.ranks[match[1]] = b_EOr @ a_ErI, rank
        adapter.parameters.add(".".join(name.split(".")[3:]))
        # PEFT wraps a module once for each of its parameters, and the first is innermost
        prefix = f"base_model.model.{match[1]}{'.base_layer' if match[2] == 'gate_up_proj' else ''}"
        a, b = a_ErI.flatten(0, 1), b_EOr.permute(1, 2, 0).flatten(1)
    adapter.tensors[f"{prefix}.lora_A.weight"] = a.contiguous()
    adapter.tensors[f"{prefix}.lora_B.weight"] = b.contiguous()
    norm = delta.norm()
    return float((delta - made).norm() / norm) if norm else 0.0


def _filled(x_rI: Tensor, rank: int) -> Tensor:
    return torch.cat([x_rI, x_rI.new_zeros(rank - len(x_rI), x_rI.shape[1])])


def _taken(models: list[Model], include: list[str], exclude: list[str]) -> Callable[[str], bool]:
    check_alike(models)
    for pattern in (*include, *exclude):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"pattern {pattern!r} is no regular expression: {error}") from error
    first, second = (model.shapes for model in models)
    for name in first:
        if first[name] != second.get(name, first[name]):
            raise UserError(
                f"{name} is {list(first[name])} in {models[0].reference} and {list(second[name])} in "
                f"{models[1].reference}: give a model and its fine-tune"
            )
    if first.keys() != second.keys():
        name = min(first.keys() ^ second.keys())
        raise UserError(f"{name} is in only one of the two models: give a model and its fine-tune")
    return lambda name: (
        (not include or any(re.search(pattern, name) for pattern in include))
        and not any(re.search(pattern, name) for pattern in exclude)
    )


def _read(model: Model, name: str) -> Tensor:
    shape = model.shapes[name]
    return model.read(name, 0, math.prod(shape)).float().view(shape)


def _leaf(name: str) -> str:
    """The module's own name, by which PEFT knows modules that are stored whole."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _configuration(adapter: _Adapter, base: str) -> dict[str, Any]:
    rank = max(adapter.ranks.values(), default=1)
    other = {module: found for module, found in adapter.ranks.items() if found != rank}
    stacked = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.parameters}
    modules = {module.rpartition(".")[2] for module in adapter.ranks} - {"experts", *stacked}
    order = {name: i for i, name in enumerate(("mlp.gate.weight", *(f"mlp.experts.{n}" for n in _STACKED)))}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": sorted(modules),
        "target_parameters": sorted(adapter.parameters, key=order.__getitem__) or None,
        "modules_to_save": sorted(adapter.whole) or None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }

"""The difference between a fine-tune and its base as low-rank adapters, in PEFT's files.

Of each matrix delta = U S V the r largest singular values are kept: B = U sqrt(S), A = sqrt(S) V, which of all matrices of
rank r is nearest to it (Eckart and Young 1936). What is no matrix (norms), and embeddings and the head, is stored whole
where it has changed. Each expert has factors of its own. Dimensions: r rank, I columns, O rows.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_llm.errors import UserError
from moe_llm.merge.models import EMBEDDING, HEAD, Model, check_alike
from moe_llm.merge.peft_files import EXPERTS, PeftAdapter, filled, is_parameter
from moe_llm.merge.write import check_output
from moe_llm.progress import tracked


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
        UserError: patterns that take nothing, models that differ in more than values, a bias that has changed, or an output
            that is in the way.
    """
    out = Path(out)
    check_output(out)
    models = [Model(base), Model(tuned)]
    taken = _taken(models, include or [], exclude or [])
    adapter, left_out = PeftAdapter(), {}
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
                adapter.whole[name] = _read(models[1], name)
        elif taken(name):
            before, after = (_read(model, name) for model in models)
            left_out[name] = _add(adapter, name, after - before, rank, sv_epsilon)
    adapter.write(out, str(models[0].directory))
    return left_out


def low_rank(delta_OI: Tensor, rank: int, sv_epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) whose product is nearest to `delta_OI`, fp32."""
    u, s, vh = torch.linalg.svd(delta_OI.float(), full_matrices=False)
    kept = min(rank, len(s))
    if sv_epsilon:
        kept = max(1, min(kept, int((s > sv_epsilon).sum())))
    root = s[:kept].sqrt()
    return root[:, None] * vh[:kept], u[:, :kept] * root


def _add(adapter: PeftAdapter, name: str, delta: Tensor, rank: int, sv_epsilon: float) -> float:
    """Add the factors of one tensor, and return the share of it that they leave out."""
    if EXPERTS.fullmatch(name):
        # what an expert has less is filled up with zeros
        pairs = [low_rank(expert, rank) for expert in delta]
        a = torch.stack([filled(a, rank) for a, _ in pairs])
        b = torch.stack([filled(b.T, rank).T for _, b in pairs])
    else:
        a, b = low_rank(delta, rank, sv_epsilon)
        if is_parameter(name):
            a, b = filled(a, rank), filled(b.T, rank).T
    adapter.factors[name] = a, b
    norm = delta.norm()
    return float((delta - b @ a).norm() / norm) if norm else 0.0


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

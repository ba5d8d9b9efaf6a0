"""Loss, perplexity and bits per byte of an ensemble, each member's own beside it, and what a token costs.

Shapes: N positions, V vocabulary of the main model.
"""

import math
from typing import Any

import torch

from moe_llm.ensemble.context import Contextual
from moe_llm.ensemble.ensemble import Ensemble
from moe_llm.ensemble.recipe import CascadeRecipe, ContextualRecipe, ExpertsRecipe
from moe_llm.ensemble.rules import Cascade, LinearMixture
from moe_llm.ensemble.scores import load_text, score


def evaluate(
    ensemble: Ensemble,
    files: list[str],
    *,
    batch_size: int = 8,
    max_blocks: int | None = None,
    chat: bool = False,
    text_field: str | None = None,
    parse_special_tokens: bool = False,
) -> dict[str, Any]:
    """Exact, over the whole vocabulary.

    Returns:
        loss (nats per token of the main model), perplexity, bits_per_byte, tokens, active_parameters of a token, of a
        cascade asked (share of the tokens for which the large model is), of mixed members disagreement (nats per token,
        `LinearMixture.disagreement`), members (the same of each, with its role or
        weight), and vocabularies of members whose tokens differ, if any. Their losses are those of their
        distributions over the main model's tokens.

    Raises:
        UserError: no text, or numbers that are not fitted yet.
    """
    rule: Any = ensemble.rule
    text = load_text(ensemble, files, max_blocks, chat, text_field, parse_special_tokens)
    losses = torch.zeros(1 + len(ensemble.models), dtype=torch.float64)
    tokens = asked = 0
    disagreement = 0.0
    for scored in score(ensemble, text, batch_size):
        at = scored.targets_N[:, None]
        context = () if scored.context_NF is None else (scored.context_NF,)
        together_NV = rule(scored.log_probs, *context)
        if isinstance(rule, (LinearMixture, Contextual)):
            disagreement += float(rule.disagreement(scored.log_probs, together_NV, *context).double().sum())
        for i, log_probs_NV in enumerate([together_NV, *scored.log_probs]):
            losses[i] -= log_probs_NV.gather(1, at).double().sum().cpu()
        asked += int(rule.asks(scored.log_probs[0]).sum())
        tokens += len(scored.targets_N)
    share = asked / tokens

    def figures(total: float) -> dict[str, float]:
        loss = total / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": text.bits_per_byte(loss),
        }

    result: dict[str, Any] = figures(float(losses[0]))
    result |= {"tokens": tokens, "active_parameters": ensemble.active_parameters(share)}
    if isinstance(rule, Cascade):
        result["asked"] = share
    if isinstance(rule, (LinearMixture, Contextual)):
        result["disagreement"] = disagreement / tokens
    members = [
        {"model": member.model} | part | figures(float(losses[1 + u]))
        | {"active_parameters": ensemble.models[u].active}
        for member, part, u in zip(ensemble.recipe.members, parts(ensemble), ensemble.index)
    ]  # fmt: skip
    result["members"] = members
    if vocabularies := ensemble.vocabularies():
        result["vocabularies"] = vocabularies
    return result


def parts(ensemble: Ensemble) -> list[dict[str, Any]]:
    """What each member does: its weight or role."""
    recipe = ensemble.recipe
    if isinstance(recipe, ContextualRecipe):
        return [{"role": "by context"} for _ in recipe.members]
    if isinstance(recipe, (ExpertsRecipe, CascadeRecipe)):
        return [{"role": member.role} for member in recipe.members]
    return [{"weight": share} for share in recipe.shares]


def format_table(result: dict[str, Any]) -> str:
    """`evaluate` for people, with its method: a table of lines."""
    asked = f"large: {result['asked']:.1%}" if "asked" in result else ""
    rows = [("model", "part", "loss", "perplexity", "bits/byte", "active parameters")]
    for found in [*result["members"], {"model": result["method"], "role": asked} | result]:
        part = found["role"] if "role" in found else f"{found['weight']:.4f}"
        values = [f"{found[key]:.4f}" for key in ("loss", "perplexity", "bits_per_byte")]
        rows.append((found["model"], part, *values, f"{found['active_parameters']:,.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    if "disagreement" in result:
        lines.append(f"the members disagree by {result['disagreement']:.4f} nats per token")
    return "\n".join([*lines, f"on {result['tokens']:,} tokens"])

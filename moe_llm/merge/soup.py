"""Greedy soup, Wortsman et al. 2022, recipe 1: models by validation loss, each kept only where the average gains."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_llm.config import SourceConfig
from moe_llm.data.sources import list_files
from moe_llm.evaluation.evaluate import evaluate_files
from moe_llm.merge.recipe import Recipe, SoupRecipe
from moe_llm.merge.run import merge_recipe, plan_of
from moe_llm.merge.write import check_output

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """One model's turn. alone: its loss (nats per token). together: that of the average with it. kept: in the soup."""

    model: str
    alone: float
    together: float
    kept: bool


def greedy_soup(
    recipe: SoupRecipe, out: str | Path, max_shard_size: str = "5GB", say: Callable[[str], None] | None = None
) -> list[Decision]:
    """Write the greedy soup of a recipe's models; its decisions, in the order in which they were made.

    The averages that are tried are written beside `out`, one at a time, and removed.

    Raises:
        UserError: whatever is wrong with the recipe, the models or the text; nothing is left behind.
    """
    out = Path(out)
    check_output(out)
    list_files(SourceConfig(type="files", path=recipe.data), "data")
    say = say or logger.info
    names = list(dict.fromkeys(item.model for item in recipe.models))
    plan = plan_of(_average(recipe, names))  # refuses what cannot be averaged before anything is evaluated
    folders = {model.reference: model.directory for model in plan.models}
    alone = {name: _loss(recipe, folders[name]) for name in names}
    names.sort(key=alone.__getitem__)
    soup, best = names[:1], alone[names[0]]
    decisions = [Decision(names[0], best, best, True)]
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    for name in names[1:]:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp-", dir=parent) as folder:
            candidate = Path(folder) / "candidate"
            merge_recipe(_average(recipe, [*soup, name]), candidate, max_shard_size, say)
            loss = _loss(recipe, candidate)
        kept = loss <= best
        decisions.append(Decision(name, alone[name], loss, kept))
        if kept:
            soup, best = [*soup, name], loss
    merge_recipe(_average(recipe, soup), out, max_shard_size, say)
    return decisions


def format_decisions(decisions: list[Decision]) -> str:
    """A table of lines."""
    width = max(len("model"), *(len(decision.model) for decision in decisions))
    lines = [f"{'model':<{width}}  {'alone':>8}  {'with it':>8}  in the soup"]
    lines += [
        f"{d.model:<{width}}  {d.alone:>8.4f}  {d.together:>8.4f}  {'yes' if d.kept else 'no'}" for d in decisions
    ]
    return "\n".join(lines)


def _average(recipe: SoupRecipe, names: list[str]) -> Recipe:
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
    return Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": recipe.dtype})


def _loss(recipe: SoupRecipe, checkpoint: Path) -> float:
    found = evaluate_files(checkpoint, recipe.data, batch_size=recipe.batch_size, max_blocks=recipe.max_blocks)
    return found["loss"]

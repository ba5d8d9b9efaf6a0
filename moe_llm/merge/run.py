"""`moe-llm merge`: read, plan, write."""

import logging
from collections.abc import Callable
from pathlib import Path

from moe_llm.errors import UserError
from moe_llm.merge.checkpoints import averaged
from moe_llm.merge.job import Job
from moe_llm.merge.mixture import make_mixture_plan
from moe_llm.merge.plan import MergePlan, make_plan
from moe_llm.merge.recipe import AnyRecipe, CheckpointRecipe, MixtureRecipe, SoupRecipe, load_recipe, recipe_text
from moe_llm.merge.write import check_output, write

logger = logging.getLogger(__name__)


def merge(
    recipe: str | Path, out: str | Path, max_shard_size: str = "5GB", say: Callable[[str], None] | None = None
) -> None:
    """Carry out the recipe in a file; `out` is a checkpoint directory that transformers loads.

    Args:
        max_shard_size: of a file, e.g. "5GB".
        say: is given sentences on what was done; None: stderr.

    Raises:
        UserError: whatever is wrong with the recipe, the models or the output; nothing is left behind.
    """
    out = Path(out)
    check_output(out)
    content = load_recipe(recipe)
    merge_recipe(content, out, max_shard_size, say)


def merge_recipe(
    recipe: AnyRecipe, out: Path, max_shard_size: str = "5GB", say: Callable[[str], None] | None = None
) -> None:
    """`merge` of a recipe that has been read; it is kept beside the weights.

    Raises:
        UserError: a greedy soup or `recalibrate`, for which models are run: see `moe_llm.train`'s soup and recalibrate.
    """
    say = say or (lambda sentence: logger.info("merge: %s", sentence))
    plan = plan_of(recipe)
    for note in plan.notes:
        say(note)
    write(plan, out, recipe_text(recipe), max_shard_size)
    for sentence in [*_told(plan), *(plan.aligner.report() if plan.aligner else ())]:
        say(sentence)


def _told(plan: MergePlan) -> list[str]:
    """What methods have noted of tensors, each sentence once."""
    names: dict[str, list[str]] = {}
    for job in plan.tensors:
        for note in job.notes if isinstance(job, Job) else ():
            names.setdefault(note, []).append(job.name)
    return [
        f"{found[0]}{f' and {len(found) - 1} more tensors' if found[1:] else ''}: {note}"
        for note, found in names.items()
    ]


def plan_of(recipe: AnyRecipe) -> MergePlan:
    """The plan that a recipe means."""
    if isinstance(recipe, SoupRecipe):
        raise UserError("greedy_soup evaluates models: use moe_llm.merge.soup.greedy_soup or `moe-llm merge`")
    if recipe.recalibrate is not None:
        raise UserError(
            "recalibrate trains routers: use moe_llm.merge.recalibrate.merge_recalibrated or `moe-llm merge`"
        )
    if isinstance(recipe, MixtureRecipe):
        return make_mixture_plan(recipe)
    return make_plan(averaged(recipe) if isinstance(recipe, CheckpointRecipe) else recipe)

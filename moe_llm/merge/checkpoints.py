"""The last checkpoints of a run as one model: Utans 1996; Izmailov et al. 2018 where they lie on one trajectory."""

from pathlib import Path

from moe_llm.checkpoint.folder import complete_checkpoints
from moe_llm.errors import UserError
from moe_llm.merge.recipe import CheckpointRecipe, Recipe


def averaged(recipe: CheckpointRecipe) -> Recipe:
    """The linear merge that a recipe for a run means; with `decay`, checkpoint i from the newest weighs decay^i.

    Raises:
        UserError: no such run, or fewer checkpoints than asked for.
    """
    root = Path(recipe.run).expanduser() / "checkpoints"
    found = complete_checkpoints(root)
    if not found:
        raise UserError(f"run={recipe.run!r} has no complete checkpoints under checkpoints/: give a run directory")
    if len(found) < recipe.last:
        raise UserError(
            f"last={recipe.last} is more than the {len(found)} complete checkpoints of {recipe.run}: "
            f"use at most {len(found)}"
        )
    decay = 1.0 if recipe.decay is None else recipe.decay
    models = [{"model": str(path), "parameters": {"weight": decay**i}} for i, path in enumerate(found[: recipe.last])]
    return Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": recipe.dtype})

"""Members and rule together.

Shapes: N positions, V vocabulary of the main model, W of a member, U different models, M members.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_llm.ensemble.context import Contextual
from moe_llm.ensemble.dropout import with_dropout
from moe_llm.ensemble.models import Model, load_models
from moe_llm.ensemble.recipe import (
    CascadeRecipe,
    ContextualRecipe,
    ExpertsRecipe,
    FittedRecipe,
    LinearRecipe,
    McDropoutRecipe,
    by_role,
)
from moe_llm.ensemble.rules import Cascade, LinearMixture, LogLinear, Rule
from moe_llm.ensemble.vocabulary import Translator, same_vocabulary
from moe_llm.errors import UserError


@dataclass
class LeftOut:
    """Probability on tokens that are not shared, summed over positions: the member's, and the main model's."""

    positions: int = 0
    theirs: float = 0.0
    ours: float = 0.0

    def add(self, theirs_shared_N: Tensor, ours_shared_N: Tensor) -> None:
        """Count positions by the logarithms of the shared probability."""
        self.positions += len(theirs_shared_N)
        self.theirs += float((1 - theirs_shared_N.double().exp()).sum())
        self.ours += float((1 - ours_shared_N.double().exp()).sum())


class Ensemble:
    """Members of a recipe whose next-token distributions become one.

    models: the different ones, the main model first. index: of each member's model among them. translators: None
    where a model has the main one's vocabulary. left_out: what of each has not been seen so far.

    Args:
        members: the models of the recipe's members; None: they are loaded.

    Raises:
        UserError: a member that cannot be loaded, or whose vocabulary shares nothing with the main one's; a cascade
            of one checkpoint.
    """

    def __init__(self, recipe: FittedRecipe, members: list[Model] | None = None):
        members = load_models(recipe.members) if members is None else members
        if isinstance(recipe, McDropoutRecipe):
            members = with_dropout(members[0], recipe.passes, recipe.dropout, recipe.seed)
        main = members[_main_member(recipe)]
        self.models = list(dict.fromkeys([main, *members]))
        if isinstance(recipe, CascadeRecipe) and len(self.models) == 1:
            raise UserError(f"small and large are both {main.name}: give a cascade two checkpoints")
        if isinstance(recipe, ContextualRecipe) and len(self.models) < len(members):
            raise UserError(f"method=contextual has {main.name} or another member twice: give different checkpoints")
        self.index = [self.models.index(member) for member in members]
        self.translators = [None if _alike(main, other) else _translator(main, other) for other in self.models]
        self.left_out = [LeftOut() for _ in self.models]
        self.use(recipe)

    def use(self, recipe: FittedRecipe) -> None:
        """Take another recipe's numbers, for the same members."""
        self.recipe = recipe
        self._rule = None if recipe.to_fit else make_rule(recipe, self.index, len(self.models))

    @property
    def main(self) -> Model:
        return self.models[0]

    @property
    def rule(self) -> Rule | Contextual:
        if self._rule is None:
            raise UserError(
                f"{self.recipe.to_fit} is not fitted: add data: [FILES] to the file, or use what "
                "`moe-llm ensemble fit` makes of it"
            )
        return self._rule

    def over_main(self, u: int, logits_NW: Tensor, main_NV: Tensor) -> Tensor:
        """Logits of model `u` as (N, V) log-probabilities, fp32, on the main model's device."""
        log_probs_NW = logits_NW.float().log_softmax(-1).to(main_NV.device)
        translator = self.translators[u]
        if translator is None:
            return log_probs_NW
        result_NV, theirs_N, ours_N = translator.complete(log_probs_NW, main_NV)
        self.left_out[u].add(theirs_N, ours_N)
        return result_NV

    def active_parameters(self, asked: float = 1.0) -> float:
        """Parameters that a token passes through, over the models that are needed.

        Args:
            asked: share of the tokens for which others than the main model are.
        """
        return self.main.active + asked * sum(self.models[u].active for u in self.rule.needed)

    def vocabularies(self) -> list[dict[str, Any]]:
        """For each model of another vocabulary: the tokens shared and, once something was computed, the probability
        left out: `left_out` of the member's, `not_asked` of the main model's."""
        found = []
        for model, translator, left in zip(self.models, self.translators, self.left_out):
            if translator is not None:
                entry = {"model": model.name, "shared_tokens": translator.shared, "tokens": translator.size}
                if left.positions:
                    entry |= {"left_out": left.theirs / left.positions, "not_asked": left.ours / left.positions}
                found.append(entry)
        return found


def make_rule(recipe: FittedRecipe, index: list[int], models: int) -> Rule | Contextual:
    """The rule of a recipe that has all its numbers.

    Args:
        index: of each member's model.
        models: how many different ones; what members of one model weigh is added up.
    """
    if isinstance(recipe, CascadeRecipe):
        assert recipe.threshold is not None, "it has all its numbers"
        return Cascade(recipe.threshold)
    if isinstance(recipe, ContextualRecipe):
        assert recipe.gate is not None, "it has all its numbers"
        return Contextual(recipe.gate, models)
    if isinstance(recipe, ExpertsRecipe):
        assert isinstance(recipe.lambda_, float), "it has all its numbers"
        base, direction = expert_directions(recipe, index, models)
        return LogLinear(tuple((base + recipe.lambda_ * direction).tolist()))
    weights = torch.zeros(models, dtype=torch.float64)
    for u, share in zip(index, recipe.shares):
        weights[u] += share
    return (LinearMixture if isinstance(recipe, (LinearRecipe, McDropoutRecipe)) else LogLinear)(
        tuple(weights.tolist())
    )


def expert_directions(recipe: ExpertsRecipe, index: list[int], models: int) -> tuple[Tensor, Tensor]:
    """(U,) each: the core's weight, and the direction positive - negative that lambda goes along."""
    roles = {role: index[i] for role, i in by_role(recipe).items()}
    units = torch.eye(models, dtype=torch.float64)
    core = roles["core"]
    return units[core], units[roles.get("positive", core)] - units[roles.get("negative", core)]


def _main_member(recipe: FittedRecipe) -> int:
    if isinstance(recipe, ExpertsRecipe):
        return by_role(recipe)["core"]
    return by_role(recipe)["small"] if isinstance(recipe, CascadeRecipe) else 0


def _alike(main: Model, other: Model) -> bool:
    if other is main:
        return True
    return main.width == other.width and same_vocabulary(main.tokenizer, other.tokenizer)


def _translator(main: Model, other: Model) -> Translator:
    return Translator(main.tokenizer, other.tokenizer, main.width, other.width, (main.name, other.name))


def describe(vocabularies: list[dict[str, Any]], main: Model) -> list[str]:
    """`Ensemble.vocabularies` as sentences."""
    sentences = []
    for entry in vocabularies:
        text = (
            f"{entry['model']} shares {entry['shared_tokens']:,} of the {entry['tokens']:,} tokens of {main.name}, "
            "which alone decides on the others"
        )
        if "left_out" in entry:
            text += (
                f"; left out, on average: {entry['left_out']:.2%} of its probability, and it is not asked for "
                f"{entry['not_asked']:.2%} of the main model's"
            )
        sentences.append(text)
    return sentences

"""Text-to-text steps: a chain of models, and one model that corrupts and restores its own draft."""

import math
import random
from dataclasses import dataclass
from typing import Any

from moe_llm.data.edits import corrupt_text
from moe_llm.ensemble.models import Model
from moe_llm.ensemble.recipe import ChainRecipe, EditsRecipe
from moe_llm.ensemble.requests import Say, answer, answer_confidence, answers, fill


@dataclass(frozen=True)
class Hypothesis:
    """A text on its way through a chain. score: the sum over the steps so far of the mean log-probability, nats per token,
    that each step's model gives its output."""

    text: str
    score: float = 0.0


def chain(recipe: ChainRecipe, models: list[Model], prompt: str, options: dict[str, Any], say: Say) -> str:
    """The last model's best output. Each step continues every text that was passed on, `n_best` times, and passes on
    those of the highest score: beam search over whole outputs. Costs 1 + n_best * (steps - 1) calls of generate()."""
    kept = [Hypothesis(prompt)]
    for step, (member, model) in enumerate(zip(recipe.members, models, strict=True), 1):
        found: dict[str, Hypothesis] = {}
        for hypothesis in kept:
            filled = fill(member.template, input=prompt, output=hypothesis.text)
            for said in answers(model, filled, options, recipe.n_best, recipe.chat):
                score = hypothesis.score + math.log(max(answer_confidence(model, said), 1e-30))
                if said.text not in found or found[said.text].score < score:  # two ways to one text: the better counts
                    found[said.text] = Hypothesis(said.text, score)
        kept = sorted(found.values(), key=lambda hypothesis: -hypothesis.score)[: recipe.n_best]
        for hypothesis in kept:
            say(f"step {step}, {hypothesis.score:.4f}: {hypothesis.text}")
    return kept[0].text


def refine_by_edits(recipe: EditsRecipe, models: list[Model], prompt: str, options: dict[str, Any], say: Say) -> str:
    """The draft after the last round. The first one is the model's continuation of the prompt; round i of n edits a share
    `rate` * (n - i) / n of its words, i from 0, and the model restores it. Costs 1 + rounds calls of generate()."""
    [model], draw = models, random.Random(recipe.seed)
    draft = answer(model, prompt, options, recipe.chat).text
    for i in range(recipe.rounds):
        say(f"draft {i + 1}: {draft}")
        edited = corrupt_text(draft, recipe.rate * (recipe.rounds - i) / recipe.rounds, draw)
        draft = answer(model, fill(recipe.template, input=prompt, draft=edited), options, recipe.chat).text
    return draft

"""Methods on whole answers, text to text: a cascade by request, stacking, self-refinement.

Members need no common vocabulary here: what passes between them is text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moe_llm.config import SourceConfig
from moe_llm.data.chat_template import own_template, render_prompt
from moe_llm.data.sources import read_documents
from moe_llm.ensemble.causal_lm import read_prompt
from moe_llm.ensemble.fit import Fitted, fit_threshold
from moe_llm.ensemble.kv_cache import room
from moe_llm.ensemble.models import Model
from moe_llm.ensemble.recipe import CascadeRecipe, SelfRefineRecipe, StackingRecipe, by_role
from moe_llm.errors import UserError

PROMPT_TOKENS = ANSWER_TOKENS = 64  # of a request that is made of a text, to fit a threshold on
Say = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a model made of a prompt.

    text: the continuation. whole: with the prompt before it. ids_T: the tokens of both, `prompt` of them the prompt's.
    """

    text: str
    whole: str
    ids_T: Tensor
    prompt: int


def answer(model: Model, prompt: str, options: dict[str, Any], chat: bool = False) -> Answer:
    """What a model makes of a prompt.

    Args:
        options: generate()'s, max_new_tokens among them; the answer ends where the model's positions do.
        chat: the prompt is a user's turn, put into the tokenizer's chat template.

    Raises:
        UserError: chat, and no template; a prompt without tokens, or longer than the model is meant for.
    """
    return _continue(model, _read(model, prompt, chat), options)


def _read(model: Model, prompt: str, chat: bool) -> Any:
    tokenizer = model.tokenizer
    if chat:
        if own_template(tokenizer) is None:
            raise UserError(f"chat=true, but the tokenizer of {model.name} has no chat template: set chat: false")
        prompt = render_prompt(tokenizer, [{"role": "user", "content": prompt}], f"the prompt of {model.name}")
    return read_prompt(tokenizer, prompt, model.rows, chat).to(model.device)


def answers(model: Model, prompt: str, options: dict[str, Any], count: int, chat: bool = False) -> list[Answer]:
    """`answer`, several of them: drawn where the options say so, else the best of as many beams."""
    if count == 1:
        return [answer(model, prompt, options, chat)]
    several = {"num_return_sequences": count, **({} if options.get("do_sample") else {"num_beams": count})}
    return _continuations(model, _read(model, prompt, chat), {**options, **several})


def _continue(model: Model, inputs: Any, options: dict[str, Any]) -> Answer:
    return _continuations(model, inputs, options)[0]


def _continuations(model: Model, inputs: Any, options: dict[str, Any]) -> list[Answer]:
    prompt, end = inputs["input_ids"].shape[1], model.tokenizer.eos_token_id
    options = {**options, "max_new_tokens": room(model, prompt, options["max_new_tokens"])}
    found = []
    for ids_T in model.model.generate(**inputs, pad_token_id=end, **options):
        while len(ids_T) > prompt + 1 and ids_T[-1] == end and ids_T[-2] == end:
            ids_T = ids_T[:-1]  # what fills up the shorter ones of several
        # decoded together, since many tokenizers drop the space that a text of its own begins with
        before, whole = (model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (ids_T[:prompt], ids_T))
        found.append(Answer(whole[len(before) :], whole, ids_T, prompt))
    return found


@torch.no_grad()
def answer_confidence(model: Model, found: Answer) -> float:
    """The geometric mean of the probabilities that a model gives its answer's tokens; 1 for none."""
    if len(found.ids_T) == found.prompt:
        return 1.0
    log_probs_TV = model.model(input_ids=found.ids_T[None, :-1]).logits[0].float().log_softmax(-1)
    said_T = log_probs_TV.gather(1, found.ids_T[1:, None])[found.prompt - 1 :]
    return float(said_T.mean().exp())


def cascade(recipe: CascadeRecipe, models: list[Model], prompt: str, options: dict[str, Any], say: Say) -> str:
    """The prompt and the small model's answer where it was confident, else the large one's."""
    roles = by_role(recipe)
    small, large = models[roles["small"]], models[roles["large"]]
    found = answer(small, prompt, options)
    sure = answer_confidence(small, found)
    assert recipe.threshold is not None, "it is fitted by now"
    if sure >= recipe.threshold:
        say(f"{small.name} answers: its confidence is {sure:.4f}, the threshold {recipe.threshold:.4f}")
        return found.whole
    say(f"{large.name} answers: {small.name}'s confidence is {sure:.4f}, the threshold {recipe.threshold:.4f}")
    return answer(large, prompt, options).whole


def fit_cascade(recipe: CascadeRecipe, models: list[Model], data: list[str], max_documents: int | None) -> Fitted:
    """A threshold for requests: the small model continues the beginning of each document, greedily.

    Raises:
        UserError: no text.
    """
    small = models[by_role(recipe)["small"]]
    source = SourceConfig(type="files", path=data, document="file")
    longest = min(PROMPT_TOKENS, small.longest or PROMPT_TOKENS)
    found = []
    for text in islice(read_documents(source, "--data"), max_documents):
        inputs = read_prompt(small.tokenizer, text, small.rows, longest=longest)
        said = _continue(small, inputs.to(small.device), {"max_new_tokens": ANSWER_TOKENS, "do_sample": False})
        found.append(answer_confidence(small, said))
    return fit_threshold(recipe, torch.tensor(found))


def stack(recipe: StackingRecipe, models: list[Model], prompt: str, options: dict[str, Any], say: Say) -> str:
    """The second model's answer, which has seen the first one's."""
    roles = by_role(recipe)
    first = answer(models[roles["first"]], prompt, options, recipe.chat).text
    say(f"first: {first}")
    filled = fill(recipe.template, input=prompt, output=first)
    return answer(models[roles["second"]], filled, options, recipe.chat).text


def self_refine(recipe: SelfRefineRecipe, models: list[Model], prompt: str, options: dict[str, Any], say: Say) -> str:
    """The draft after the last round of criticism and revision."""
    roles = by_role(recipe)
    writer, critic = models[roles["writer"]], models[roles.get("critic", roles["writer"])]
    draft = answer(writer, prompt, options, recipe.chat).text
    for n in range(recipe.rounds):
        say(f"draft {n + 1}: {draft}")
        filled = fill(recipe.critique, input=prompt, draft=draft)
        critique = answer(critic, filled, options, recipe.chat).text
        say(f"critique {n + 1}: {critique}")
        if recipe.stop is not None and recipe.stop in critique:
            break
        filled = fill(recipe.revise, input=prompt, draft=draft, critique=critique)
        draft = answer(writer, filled, options, recipe.chat).text
    return draft


def fill(template: str, **texts: str) -> str:
    """A template with its {names} replaced; braces within the texts stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)

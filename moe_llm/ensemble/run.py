"""`moe-llm generate --ensemble`, `moe-llm evaluate --ensemble` and `moe-llm ensemble fit`."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_llm.atomic import write_atomically
from moe_llm.config import SourceConfig
from moe_llm.data.sources import list_files
from moe_llm.ensemble import requests
from moe_llm.ensemble.causal_lm import as_prompt, said, sampling
from moe_llm.ensemble.context import Contextual
from moe_llm.ensemble.ensemble import Ensemble, describe
from moe_llm.ensemble.evaluate import evaluate
from moe_llm.ensemble.fit import Fitted, check_fittable, fit
from moe_llm.ensemble.kv_cache import room
from moe_llm.ensemble.models import Model, load_models
from moe_llm.ensemble.recipe import (
    AnyRecipe,
    CascadeRecipe,
    ChainRecipe,
    ContextualRecipe,
    EditsRecipe,
    ExpertsRecipe,
    RequestRecipe,
    SelfRefineRecipe,
    StackingRecipe,
    load_recipe,
    recipe_text,
)
from moe_llm.ensemble.rules import Cascade, LinearMixture
from moe_llm.ensemble.text_steps import chain, refine_by_edits
from moe_llm.errors import UserError

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


def generate_command(
    file: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    say: Say | None = None,
) -> str:
    """The prompt and its continuation by an ensemble; of stacking and self-refinement, the last answer alone.

    Args:
        chat: the prompt is a user's turn, in the main model's chat template; the answer alone is given.
        temperature: 0 takes the likeliest token each time.
        say: is given sentences on what was done; None: stderr.

    Raises:
        UserError: whatever is wrong with the file, the members or the text for fitting.
    """
    say = say or _log
    recipe = load_recipe(file)
    _check_fitted(recipe, file)
    options = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_p)}
    if _by_request(recipe):
        if chat:
            raise UserError(f"--chat does not apply to method={recipe.method}: set chat: true of its members in {file}")
        return _generate_requests(recipe, prompt, options, seed, say)
    from moe_llm.ensemble.processor import EnsembleLogitsProcessor

    ensemble = _ready(recipe, say)
    torch.manual_seed(seed)
    main = ensemble.main
    inputs = as_prompt(main.tokenizer, prompt, main.rows, chat, main.name).to(main.device)
    options["max_new_tokens"] = room(main, inputs["input_ids"].shape[1], max_new_tokens)
    processor = EnsembleLogitsProcessor(ensemble)
    options |= {"logits_processor": [processor], "pad_token_id": main.tokenizer.eos_token_id}
    output = main.model.generate(**inputs, **options)
    _tell_what_was_left_out(ensemble, say)
    if isinstance(ensemble.rule, Cascade):
        say(f"{ensemble.models[1].name} was asked for {processor.asked} of {processor.rows} tokens")
    if isinstance(ensemble.rule, (LinearMixture, Contextual)) and processor.rows and len(ensemble.models) > 1:
        say(f"the members disagree by {processor.disagreement / processor.rows:.3f} nats per token (0: not at all)")
    return said(main.tokenizer, output[0], inputs["input_ids"].shape[1] if chat else 0)


def evaluate_command(
    file: str | Path,
    files: list[str],
    *,
    batch_size: int = 8,
    max_blocks: int | None = None,
    chat: bool = False,
    text_field: str | None = None,
    parse_special_tokens: bool = False,
    say: Say | None = None,
) -> dict[str, Any]:
    """`moe_llm.ensemble.evaluate.evaluate` of a file's ensemble, with its method.

    Raises:
        UserError: whatever is wrong with the file, the members or the text; a method that gives text no probability.
    """
    say = say or _log
    recipe = load_recipe(file)
    if _by_request(recipe):
        per = " with per=request" if isinstance(recipe, CascadeRecipe) else ""
        raise UserError(
            f"{file}: method={recipe.method}{per} writes whole answers and gives a text no probability: "
            "use it with `moe-llm generate`"
        )
    _check_fitted(recipe, file)
    _check_text(files, "--data")
    ensemble = _ready(recipe, say)
    result = evaluate(
        ensemble,
        files,
        batch_size=batch_size,
        max_blocks=max_blocks,
        chat=chat,
        text_field=text_field,
        parse_special_tokens=parse_special_tokens,
    )
    _tell_what_was_left_out(ensemble, say)
    return {"method": recipe.method, **result}


def fit_command(
    file: str | Path, out: str | Path, data: list[str], *, max_blocks: int | None = None, batch_size: int = 8
) -> str:
    """Write a file's ensemble with its numbers fitted to text; what was found, as lines.

    Raises:
        UserError: whatever is wrong with the file, the members, the text or the output; nothing is written then.
    """
    recipe, out = load_recipe(file), Path(out)
    if isinstance(recipe, RequestRecipe):
        raise UserError(f"{file}: method={recipe.method} has nothing to fit: use it with `moe-llm generate` as it is")
    check_fittable(recipe)
    _check_output(out)
    _check_text(data, "--data")
    if isinstance(recipe, CascadeRecipe) and _by_request(recipe):
        fitted = requests.fit_cascade(recipe, load_models(recipe.members), data, max_blocks)
    else:
        ensemble = Ensemble(recipe)
        fitted = fit(ensemble, data, max_blocks=max_blocks, batch_size=batch_size)
    lines = [*report(fitted), f"{out}: written"]
    _write(out, "".join(f"# {line}\n" for line in report(fitted)) + recipe_text(fitted.recipe))
    return "\n".join(lines)


def report(fitted: Fitted) -> list[str]:
    """What a fit found, as sentences."""
    recipe = fitted.recipe
    if isinstance(recipe, CascadeRecipe):
        what = "requests" if recipe.per == "request" else "tokens"
        return [f"threshold {recipe.threshold:.6g}: the large model for {fitted.asked:.2%} of {fitted.tokens:,} {what}"]
    lines = [f"loss {fitted.loss:.4f} nats per token, on the {fitted.tokens:,} tokens that were fitted on"]
    if fitted.excluded:
        lines.append(f"{fitted.excluded:,} more tokens, to which no member gives a probability, were left out")
    if isinstance(recipe, ContextualRecipe):
        lines.append(f"loss {fitted.before:.4f} with the best constant weights")
        return [*lines, *(f"loss {loss:.4f} of {m.model} alone" for m, loss in zip(recipe.members, fitted.alone))]
    if fitted.before is not None:
        lines.append(f"loss {fitted.before:.4f} with the numbers given before")
    shares = getattr(recipe, "shares", None)
    for i, (member, loss) in enumerate(zip(recipe.members, fitted.alone)):
        part = getattr(member, "role", "") if shares is None else f"weight {shares[i]:.4f}"
        lines.append(f"loss {loss:.4f} of {member.model} alone, {part}")
    if isinstance(recipe, ExpertsRecipe):
        lines.append(f"lambda {recipe.lambda_:.4f}")
    return lines


def _ready(recipe: Any, say: Say) -> Ensemble:
    """The ensemble of a recipe that works token by token, fitted where its file says so."""
    ensemble = Ensemble(recipe)
    if recipe.to_fit:
        for line in report(fit(ensemble, recipe.data, max_blocks=recipe.max_blocks)):
            say(line)
    return ensemble


def _generate_requests(recipe: AnyRecipe, prompt: str, options: dict[str, Any], seed: int, say: Say) -> str:
    models: list[Model] = load_models(recipe.members)
    if isinstance(recipe, CascadeRecipe) and recipe.to_fit:
        assert recipe.data is not None, "`_check_fitted` has looked"
        fitted = requests.fit_cascade(recipe, models, recipe.data, recipe.max_blocks)
        for line in report(fitted):
            say(line)
        recipe = fitted.recipe
    torch.manual_seed(seed)
    if isinstance(recipe, CascadeRecipe):
        return requests.cascade(recipe, models, prompt, options, say)
    if isinstance(recipe, StackingRecipe):
        return requests.stack(recipe, models, prompt, options, say)
    if isinstance(recipe, ChainRecipe):
        return chain(recipe, models, prompt, options, say)
    if isinstance(recipe, EditsRecipe):
        return refine_by_edits(recipe, models, prompt, options, say)
    assert isinstance(recipe, SelfRefineRecipe)
    return requests.self_refine(recipe, models, prompt, options, say)


def _by_request(recipe: AnyRecipe) -> bool:
    if isinstance(recipe, CascadeRecipe):
        return recipe.per == "request"
    return isinstance(recipe, RequestRecipe)


def _check_fitted(recipe: AnyRecipe, file: str | Path) -> None:
    """Refuse, before anything is loaded, a recipe that cannot be made ready."""
    to_fit, data = getattr(recipe, "to_fit", None), getattr(recipe, "data", None)
    if to_fit and data is None:
        raise UserError(
            f"{file}: {to_fit} needs data: add data: [FILES], or use what `moe-llm ensemble fit` makes of it"
        )
    if to_fit and data is not None:
        _check_text(data, f"{file}: data")


def _check_text(files: list[str], field: str) -> None:
    """Refuse files that are missing or empty before models are loaded."""
    list_files(SourceConfig(type="files", path=files), field)


def _tell_what_was_left_out(ensemble: Ensemble, say: Say) -> None:
    for sentence in describe(ensemble.vocabularies(), ensemble.main):
        say(sentence)


def _check_output(out: Path) -> None:
    if out.exists():
        raise UserError(f"output {str(out)!r} exists already: give a file that is not there yet")
    if not out.absolute().parent.is_dir():
        raise UserError(f"output {str(out)!r} is in no directory that exists: make it first")


def _write(out: Path, text: str) -> None:
    try:
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"output {str(out)!r} cannot be written ({error.strerror}): give another file") from error


def _log(sentence: str) -> None:
    logger.info("ensemble: %s", sentence)

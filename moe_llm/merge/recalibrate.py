"""The routers of a merged mixture, fitted on text with all else as it is: `recalibrate` in a recipe.

Merged experts are not the ones that the merged routers were trained for. Fitted is the language-model loss with the
balance loss, as in training, rather than the parents' choices: those are choices among the parents' experts, and where
a merge has changed these, or has made the experts of dense models, there is nothing to agree with.

Every eighth batch of the text is left out of the fit and judges it: the routers stay as merged if the loss there is
not lower with the fitted ones, in the dtype in which they are stored.
"""

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from moe_llm.atomic import rename_directory
from moe_llm.checkpoint.manifest import write_file
from moe_llm.checkpoint.plan import MODEL
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.checkpoint.weights import Weights
from moe_llm.config.data import SourceConfig
from moe_llm.data.loader import load_evaluation
from moe_llm.data.packing import Batch, model_inputs
from moe_llm.data.sources import list_files
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.distributed.runtime import Runtime
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.merge.recipe import AnyRecipe, Recalibration, SoupRecipe, recipe_text
from moe_llm.merge.run import merge_recipe, plan_of
from moe_llm.merge.write import RECIPE_FILE, check_output
from moe_llm.progress import tracked

logger = logging.getLogger(__name__)

_HELD_OUT = 8  # one batch of so many judges


class Outcome(NamedTuple):
    """Losses (nats per token) on the batches that were not fitted, before and after, and whether the fit is kept."""

    before: float
    after: float
    kept: bool


def merge_recalibrated(
    recipe: AnyRecipe, out: str | Path, max_shard_size: str = "5GB", say: Callable[[str], None] | None = None
) -> Outcome:
    """Carry out a recipe with `recalibrate`: the merge, written beside `out`, and then its routers.

    Raises:
        UserError: whatever is wrong with the recipe, the models, the text or the output; nothing is left behind.
    """
    assert not isinstance(recipe, SoupRecipe), "a soup has no recalibrate"
    out, settings = Path(out), recipe.recalibrate
    say = say or (lambda sentence: logger.info("merge: %s", sentence))
    assert settings is not None, "the recipe has no recalibrate"
    check_output(out)
    list_files(SourceConfig(type="files", path=settings.text), "recalibrate.text")
    plain = recipe.model_copy(update={"recalibrate": None})
    if plan_of(plain).donor.config is None:
        raise UserError("recalibrate fits routers, and these models are dense: remove it")
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp-", dir=parent) as folder:
        candidate = Path(folder) / "candidate"
        merge_recipe(plain, candidate, max_shard_size, say)
        write_file(candidate / RECIPE_FILE, recipe_text(recipe))
        outcome = recalibrate(candidate, settings)
        out.parent.mkdir(parents=True, exist_ok=True)
        rename_directory(candidate, out)
    what = "recalibrated" if outcome.kept else "as merged, for the fit does not help"
    say(f"routers {what}: loss on text that was not fitted {outcome.before:.4f} before, {outcome.after:.4f} after")
    return outcome


def recalibrate(directory: Path, settings: Recalibration) -> Outcome:
    """Fit the routers of a checkpoint directory and write them into its files; nothing else there changes.

    The same on every call: batches go in their order, over again where the text is short.

    Raises:
        UserError: too little text.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MoEForCausalLM.from_pretrained(directory).to(device)
    fitted, judges = _batches(directory, settings, model.config.longest_text, model.config.resolved_vocab_size)
    before = _loss(model, judges, device)
    files = TensorFiles(directory, MODEL)
    stored = Weights(files).stored()
    names = {name: stored[hf.published_name(name)] for name, _ in model.named_parameters() if hf.is_router(name)}
    _fit(model, fitted, settings, device)
    routers = {stored: model.get_parameter(name).detach().to(files.dtype(stored)) for name, stored in names.items()}
    with torch.no_grad():
        for name, stored_name in names.items():  # judged as they will be read
            model.get_parameter(name).copy_(routers[stored_name])
    after = _loss(model, judges, device)
    kept = after < before  # not so with what is not a number
    for stored_name, router in routers.items() if kept else ():
        files.overwrite(stored_name, router)
    return Outcome(before, after, kept)


def _batches(directory: Path, settings: Recalibration, longest: int, rows: int) -> tuple[list[Batch], list[Batch]]:
    """What is fitted, and what judges. No more of the text is read than is used."""
    length = min(settings.sequence_length, longest)
    wanted = -(-settings.steps * _HELD_OUT // (_HELD_OUT - 1)) + _HELD_OUT
    text = load_evaluation(
        settings.text,
        load_tokenizer(directory),
        sequence_length=length,
        max_tokens=wanted * settings.batch_size * length,
        rows=rows,
    )
    batches = list(text.batches(micro_batch_size=settings.batch_size))
    if len(batches) < _HELD_OUT:
        raise UserError(
            f"recalibrate.text has {len(text)} blocks of {length} tokens, too few for {_HELD_OUT} batches of "
            f"batch_size={settings.batch_size}: give more text, or lower batch_size or sequence_length"
        )
    judges = batches[_HELD_OUT - 1 :: _HELD_OUT]
    return [batch for i, batch in enumerate(batches) if i % _HELD_OUT != _HELD_OUT - 1], judges


def _fit(model: MoEForCausalLM, batches: Sequence[Batch], settings: Recalibration, device: torch.device) -> None:
    """AdamW on fp32 masters, the rate falling to 0; in evaluation mode, that is without noise or limit of capacity."""
    runtime = Runtime(None, device, 0, 1, False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(hf.is_router(name))
    routers = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float().clone() for parameter in routers]
    optimizer = torch.optim.AdamW(masters, lr=settings.lr, weight_decay=0.0)
    for step in tracked(range(settings.steps), "fitting routers"):
        batch = batches[step % len(batches)].to(device)
        StepLoss(model.config, runtime, [batch])(model(**model_inputs(batch))).total.backward()
        for parameter, master in zip(routers, masters, strict=True):
            assert parameter.grad is not None, "every router is in the loss"
            master.grad, parameter.grad = parameter.grad.float(), None
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(routers, masters, strict=True):
                parameter.copy_(master)


@torch.no_grad()
def _loss(model: MoEForCausalLM, batches: Sequence[Batch], device: torch.device) -> float:
    outputs = [model(**model_inputs(batch.to(device))) for batch in batches]
    return sum(output.loss_sum.item() for output in outputs) / sum(int(output.num_targets) for output in outputs)

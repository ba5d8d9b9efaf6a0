"""A checkpoint of the ranks as transformers sees it."""

import traceback
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_llm.checkpoint.export import DTYPES
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import Config
from moe_llm.data.packing import Batch
from moe_llm.doctor.compare import Tolerances, Whole
from moe_llm.doctor.findings import FAIL, Finding, exact, note, within
from moe_llm.doctor.oracle import checkpoint as files
from moe_llm.families import hf
from moe_llm.families.architectures import MISTRAL, architecture_of, export_note
from moe_llm.families.layout import from_stacked, in_one


def check_files(directory: str, config: Config) -> list[Finding]:
    """What the checkpoint's files say of model, tokenizer and dtype."""
    path, dtype = Path(directory), config.checkpoint.dtype
    buffers = [hf.published_name(name) for name in hf.buffer_shapes(config.model)]
    buffers += [architecture_of(config.model).stored_name(name) for name in buffers]
    return [
        exact(
            "export_config", "config.json: the model that was trained", files.wrong_fields(path, config.model, dtype)
        ),
        exact("export_tokens", "special tokens: the same in model and tokenizer", files.wrong_tokens(path)),
        exact("export_dtype", f"tensors are stored in {dtype}", files.wrong_dtypes(path, dtype, buffers)),
    ]


@torch.no_grad()
def check_export(
    directory: str,
    weights: Whole,
    config: Config,
    batch: Batch,
    allowed: Tolerances,
    adapted: Container[str] = (),
) -> list[Finding]:
    """Every tensor of `weights` (whole, as in training) is there, no other is, and logits are those of our model.

    Args:
        adapted: those that were merged with low-rank factors: their sums are equal but for rounding.
    """
    architecture = architecture_of(config.model)
    if not (architecture.native or architecture.code):
        return [note(f"{export_note(config.model)}; they are not loaded there")]
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto",
            output_loading_info=True,
            experts_implementation="eager",
            trust_remote_code=architecture.code,  # this package's own, written a moment ago
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user's users would meet
        said = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        return [
            Finding(
                "export_load",
                "checkpoint in transformers: loads",
                FAIL,
                where=said,
                evidence={"trace": traceback.format_exc()},
            )
        ]
    theirs, report = loaded
    wrong = [
        f"{kind.replace('_', ' ')}: {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, report[kind]))
        if not name.endswith(architecture.unused)
    ]
    keys = exact("export_keys", "checkpoint in transformers: all tensors, no others", wrong)

    due = DTYPES[config.checkpoint.dtype]
    other = [
        f"{name} is {parameter.dtype} in memory, trained and stored as {due}"
        for name, parameter in theirs.named_parameters()
        if parameter.dtype != due
    ]
    loaded = exact("export_loaded", f"checkpoint in transformers: loads in {config.checkpoint.dtype} by itself", other)
    theirs = theirs.float()
    held = {hf.published_name(name): tensor for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]}
    if architecture is MISTRAL:
        held = {hf.of_the_only_expert(name): tensor for name, tensor in held.items()}
    for name in weights:
        if in_one(architecture, name) and hf.published_name(name) in held:
            held[hf.published_name(name)] = from_stacked(name, held[hf.published_name(name)])
    buffers, unequal = hf.buffer_shapes(config.model), []
    for name, value in weights.items():
        if name.endswith(architecture.dispensable):
            continue
        dtype = torch.float32 if name in buffers else DTYPES[config.checkpoint.dtype]
        stored = torch.from_numpy(value).to(dtype).float()
        found = _found(name, tuple(stored.shape), held)
        if found is None or found.shape != stored.shape:
            unequal.append(name)
        elif name in adapted:
            step = {"fp32": 1e-6, "bf16": 1e-2, "fp16": 2e-3}[config.checkpoint.dtype]
            if not torch.allclose(found, stored, rtol=step, atol=1e-7):
                unequal += _where(name, found, stored)
        elif not torch.equal(found, stored):
            unequal += _where(name, found, stored)
    tensors = exact("export", "checkpoint in transformers: every weight, to the bit", unequal)

    ours = MoEForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids_BS = batch.input_ids_BS[:1, : int(batch.attention_mask_BS[0].sum())]
    a, b = theirs.eval()(ids_BS).logits.numpy(), ours(ids_BS).logits.numpy()
    apart = float(np.abs(a - b).max() / np.abs(a).max())
    return [
        keys,
        loaded,
        tensors,
        within("export_logits", "checkpoint in transformers: logits", [(apart, allowed.logits, "the largest logit")]),
    ]


def _found(name: str, shape: tuple[int, ...], held: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """An in-memory tensor of ours among theirs by published names, whole or in its pieces; None where it is not."""
    if hf.published_name(name) in held:
        return held[hf.published_name(name)]
    pieces = hf.pieces(name, shape)
    if any(piece.name not in held for piece in pieces):
        return None
    whole = torch.empty(shape)
    for piece in pieces:
        whole[piece.index] = held[piece.name]
    return whole


def _where(name: str, found: torch.Tensor, stored: torch.Tensor) -> list[str]:
    """The name; for experts, with those that differ."""
    if found.dim() != 3:
        return [name]
    return [f"{name}, expert {e}" for e in range(len(found)) if not torch.equal(found[e], stored[e])]

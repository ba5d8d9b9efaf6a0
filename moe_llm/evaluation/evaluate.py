"""Loss on held-out text, during training and of a checkpoint."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.config import Config
from moe_llm.data.loader import Data, load_evaluation
from moe_llm.data.packing import Batch, model_inputs
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime
from moe_llm.errors import UserError, require_package
from moe_llm.model import quantized
from moe_llm.ops.preference import MEASURED, Preference
from moe_llm.progress import tracked


def preference_inputs(config: Config, batch: Batch) -> dict[str, Any]:
    """What the model's forward pass takes beside a batch of pairs of answers; nothing for other data."""
    if batch.reference_BS is None:
        return {}
    settings = config.preference
    return {
        "preference": Preference(
            settings.loss, settings.beta, settings.gamma, settings.label_smoothing, batch.reference_BS
        )
    }


@torch.no_grad()
def validation_loss(
    config: Config, engine: Engine, runtime: Runtime, data: Data, heartbeat: Callable[[str], None] = lambda phase: None
) -> dict[str, Any]:
    """Cross-entropy over the held-out blocks (nats per token) and bits per byte, and, where there are several sources, that
    of each; the same on every rank. Of pairs of answers `val_loss` is their loss, and there are `val_accuracy` (share of
    pairs whose chosen answer is ahead), `val_margin` and the answers' mean log-probabilities in place of bits per byte.

    Args:
        heartbeat: called before each batch.
    """
    engine.model.eval()
    sources = data.validation.by_source(micro_batch_size=config.train.micro_batch_size, **runtime.reads)
    totals = torch.zeros(len(sources), 2 + len(MEASURED), dtype=torch.float64, device=runtime.device)
    for s, (name, batches) in enumerate(sources.items()):
        for i, batch in enumerate(batches):
            heartbeat(f"validation, batch {i + 1} of {len(batches)} of {name}")
            batch = batch.to(runtime.device)
            output = engine.forward(**model_inputs(batch), **preference_inputs(config, batch))
            assert output.loss_sum is not None, "held-out batches have labels"
            assert output.num_targets is not None
            if output.preference is None:
                totals[s, :2] += torch.stack([output.loss_sum.double(), output.num_targets.double()])
            else:
                totals[s, 1:] += torch.cat([output.preference.pairs[None], output.preference.measured]).double()
    engine.model.train()
    found = runtime.sum(totals)
    loss_sum, targets, *pairs = found.sum(0).tolist()
    losses = found[:, 0]
    if config.data.has_preference:
        of_pairs = dict(zip(MEASURED, (value / targets for value in pairs)))
        measured = {"val_loss": of_pairs.pop("preference_loss")} | {f"val_{k}": value for k, value in of_pairs.items()}
        losses = found[:, 2 + MEASURED.index("preference_loss")]
    else:
        loss = loss_sum / targets
        measured = {"val_loss": loss, "val_bits_per_byte": data.validation.bits_per_byte(loss)}
    if len(sources) > 1:
        by_source = (losses / found[:, 1].clamp(min=1)).tolist()
        measured["val_loss_by_source"] = dict(zip(sources, by_source))
    return measured


@torch.no_grad()
def evaluate_files(
    checkpoint: str | Path,
    files: str | list[str],
    *,
    batch_size: int = 8,
    sequence_length: int | None = None,
    max_blocks: int | None = None,
    chat: bool = False,
    text_field: str | None = None,
    parse_special_tokens: bool = False,
    quantize_experts: Literal["int8", "nf4"] | None = None,
) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per byte of a checkpoint on text files.

    Args:
        text_field: the column that holds the text, of files with rows; None: `text`.
        chat: the files hold chat, and the loss is that of the assistant's turns.
        parse_special_tokens: of text, as `data.parse_special_tokens`.
        quantize_experts: hold the experts in 8 or 4 bits; what that costs is in the result (`quantized.quantize_experts`).

    Raises:
        UserError: no checkpoint there, or no text.
    """
    if quantize_experts is not None:
        require_package("bitsandbytes", f"--quantize-experts {quantize_experts}")
    from moe_llm.checkpoint.pretrained import MoEForCausalLM

    check_checkpoint_directory(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MoEForCausalLM.from_pretrained(checkpoint)
    packed = {} if quantize_experts is None else quantized.quantize_experts(model, quantize_experts)
    model.to(device)
    length = sequence_length or min(model.config.longest_text, 4096)
    text = load_evaluation(
        files,
        tokenizer,
        sequence_length=length,
        max_blocks=max_blocks,
        chat=chat,
        text_field=text_field,
        parse_special_tokens=parse_special_tokens,
        rows=model.config.vocab_size,
    )
    loss_sum, targets = 0.0, 0
    for batch in tracked(text.batches(micro_batch_size=batch_size), "evaluating"):
        output = model(**model_inputs(batch.to(device)))
        loss_sum += output.loss_sum.item()
        targets += int(output.num_targets)
    loss = loss_sum / targets
    if not math.isfinite(loss):
        raise UserError(
            f"checkpoint {str(checkpoint)!r} has no finite loss on this text ({loss}), though its weights are finite: they "
            "are damaged, or have overflowed in training; use another checkpoint"
        )
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": text.bits_per_byte(loss),
        "tokens": targets,
        **packed,
    }

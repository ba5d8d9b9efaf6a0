"""Loss on held-out text, during training and of a checkpoint."""

import math
from pathlib import Path

import torch

from moe_llm.config import Config
from moe_llm.data.loader import Data
from moe_llm.errors import UserError
from moe_llm.parallel.engine import Engine
from moe_llm.parallel.runtime import Runtime
from moe_llm.train.loop import model_inputs
from moe_llm.train.metrics import bits_per_byte


@torch.no_grad()
def validation_loss(config: Config, engine: Engine, runtime: Runtime, data: Data) -> dict[str, float]:
    """Cross-entropy over the held-out blocks (nats a token) and bits per byte; the same on every rank."""
    engine.model.eval()
    totals = torch.zeros(2, dtype=torch.float32, device=runtime.device)
    for batch in data.validation_batches(config.train.micro_batch_size):
        output = engine.forward(**model_inputs(batch.to(runtime.device)))
        totals += torch.stack([output.loss_sum.float(), output.num_targets.float()])
    engine.model.train()
    loss_sum, targets = runtime.sum(totals).tolist()
    loss = loss_sum / targets
    return {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, data.bytes_per_token)}


@torch.no_grad()
def evaluate_files(
    checkpoint: str | Path, files: str | list[str], *, batch_size: int = 8, sequence_length: int | None = None,
    max_blocks: int | None = None,
) -> dict[str, float]:
    """Loss (nats a token), perplexity and bits per byte of a checkpoint on text files.

    Raises:
        UserError: no checkpoint there, or no text.
    """
    from transformers import AutoTokenizer

    from moe_llm.checkpoint.pretrained import MoEForCausalLM
    from moe_llm.data.loader import file_batches

    if not (Path(checkpoint) / "config.json").is_file():
        raise UserError(f"checkpoint {str(checkpoint)!r} holds no config.json: name a checkpoint directory")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MoEForCausalLM.from_pretrained(checkpoint).to(device).eval()
    length = sequence_length or min(model.config.max_position_embeddings, 4096)
    evaluation = file_batches(files, tokenizer, sequence_length=length, batch_size=batch_size, max_blocks=max_blocks)
    loss_sum, targets = 0.0, 0
    for batch in evaluation.batches:
        output = model(**model_inputs(batch.to(device)))
        loss_sum += output.loss_sum.item()
        targets += int(output.num_targets)
    loss = loss_sum / targets
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_byte(loss, evaluation.bytes_per_token),
        "tokens": targets,
    }

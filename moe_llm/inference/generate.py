"""Continue a text. Most checkpoints are transformers' own, so transformers does it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.data.documents import vocabulary_size
from moe_llm.data.tokenizer import end_token_ids, load_tokenizer
from moe_llm.ensemble.causal_lm import (
    as_prompt,
    generate_plainly,
    learned_positions,
    load_causal_lm,
    said,
    sampling,
)
from moe_llm.errors import UserError, require_package
from moe_llm.families.architectures import OWN
from moe_llm.model import quantized

logger = logging.getLogger(__name__)


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    quantize_experts: Literal["int8", "nf4"] | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """The prompt and its continuation; temperature 0 takes the likeliest token each time.

    Args:
        chat: the prompt is a user's turn, put into the tokenizer's chat template; the answer alone is given.
        quantize_experts: hold the experts in 8 or 4 bits.
        say: is given a sentence where generation routes otherwise than training did; None: stderr.

    Raises:
        UserError: the directory is no checkpoint, or a damaged one; the prompt is longer than its positions, or holds a
            token beyond its rows; or chat, and there is no template.
    """
    if quantize_experts is not None:
        require_package("bitsandbytes", f"--quantize-experts {quantize_experts}")
    check_checkpoint_directory(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(checkpoint)
    content = read_json(Path(checkpoint) / "config.json")
    rows = content.get("vocab_size", vocabulary_size(tokenizer))
    inputs = as_prompt(tokenizer, prompt, rows, chat, str(checkpoint)).to(device)
    length = inputs["input_ids"].shape[1]
    if content.get("model_type") == OWN.model_type:
        torch.manual_seed(seed)
        model = _packed(MoEForCausalLM.from_pretrained(checkpoint), quantize_experts).to(device)
        router = model.config.router
        if not router.causal:
            (say or logger.info)(
                f"model.router.type={router.type}: in training {router.looks_ahead}, evaluation and generation "
                f"{router.afterwards}"
            )
        ids_BS = _continue(model, inputs["input_ids"], max_new_tokens, temperature, top_p, end_token_ids(tokenizer))
        return said(tokenizer, ids_BS[0], length if chat else 0)
    model = _packed(load_causal_lm(checkpoint), quantize_experts).to(device)
    longest = learned_positions(model)
    if longest is not None:
        if length > longest:
            raise UserError(
                f"the prompt has {length} tokens, and {str(checkpoint)!r} only "
                f"max_position_embeddings={longest} positions: give a shorter prompt"
            )
        max_new_tokens = min(max_new_tokens, longest + 1 - length)  # the last token is not read again
    torch.manual_seed(seed)
    generate_plainly(model, tokenizer)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling(temperature, top_p))
    return said(tokenizer, output[0], length if chat else 0)


@torch.no_grad()
def _packed(model: Any, kind: Literal["int8", "nf4"] | None) -> Any:
    if kind is not None:
        quantized.quantize_experts(model, kind)
    return model


@torch.no_grad()
def _continue(
    model: MoEForCausalLM,
    ids_BS: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: list[int],
) -> torch.Tensor:
    """The ids and their continuation, each token from the whole text before it, as far as the model is meant for."""
    for _ in range(max_new_tokens):
        logits_BV = model(ids_BS[:, -model.config.longest_text :]).logits[:, -1].float()
        if temperature == 0:
            next_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            probability_BV, token_BV = (logits_BV / temperature).softmax(-1).sort(descending=True)
            kept_BV = probability_BV.cumsum(-1) - probability_BV < top_p  # the likeliest that reach top_p together
            next_B1 = token_BV.gather(-1, torch.multinomial(probability_BV * kept_BV, 1))
        ids_BS = torch.cat([ids_BS, next_B1], 1)
        if next_B1.item() in ends:
            break
    return ids_BS

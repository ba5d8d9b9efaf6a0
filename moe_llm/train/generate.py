"""Continue a text. Checkpoints are transformers checkpoints, so transformers does it."""

from pathlib import Path

import torch

from moe_llm.checkpoint.folder import complete_checkpoints
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.ensemble.causal_lm import load_causal_lm, sampling
from moe_llm.errors import UserError


def check_checkpoint_directory(checkpoint: str | Path) -> None:
    """Refuse what is plainly no checkpoint, before anything heavy is imported."""
    if (Path(checkpoint) / "config.json").is_file():
        return
    newest = next(iter(complete_checkpoints(Path(checkpoint) / "checkpoints")), None)
    name = f"such as {newest}" if newest else "such as RUN/checkpoints/step-00000020"
    raise UserError(f"checkpoint {str(checkpoint)!r} holds no config.json: name a checkpoint directory, {name}")


def generate(
    checkpoint: str | Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.8, top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The prompt and its continuation; temperature 0 takes the likeliest token each time.

    Raises:
        UserError: the directory is no checkpoint, or a damaged one.
    """
    check_checkpoint_directory(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(checkpoint)
    model = load_causal_lm(checkpoint).to(device)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling(temperature, top_p)
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)

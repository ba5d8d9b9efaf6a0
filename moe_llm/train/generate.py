"""Continue a text. Checkpoints are transformers checkpoints, so transformers does it."""

from pathlib import Path

import torch

from moe_llm.checkpoint.folder import complete_checkpoints
from moe_llm.data.tokenizer import load_tokenizer
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
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    check_checkpoint_directory(checkpoint)
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(checkpoint)
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint {str(checkpoint)!r} cannot be loaded, its config.json or model.safetensors is unusable "
            f"({reason}): use another checkpoint"
        ) from error
    model.to(device).eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    sampling = {"do_sample": False} if temperature == 0 else {
        "do_sample": True, "temperature": temperature, "top_p": top_p
    }
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)

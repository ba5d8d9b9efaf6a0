"""Any causal LM that transformers knows, from a directory, and how it is sampled from."""

from pathlib import Path
from typing import Any

import torch

from moe_llm.errors import UserError


def load_causal_lm(checkpoint: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """A checkpoint directory as transformers' model, on the CPU, in evaluation mode.

    Args:
        dtype: of the weights; `auto`: as stored.

    Raises:
        UserError: it is damaged, or of no architecture that transformers knows.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint {str(checkpoint)!r} cannot be loaded, its config.json or model.safetensors is unusable "
            f"({reason}): use another checkpoint"
        ) from error


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """generate()'s options for a temperature, 0 meaning the likeliest token, and top-p."""
    return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}

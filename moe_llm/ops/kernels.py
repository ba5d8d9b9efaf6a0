"""Which kernels a run takes: chosen once, at its start, for everything that follows in the process."""

import torch

from moe_llm.errors import UserError
from moe_llm.ops import compiled, liger


def choose(kernels: str, compile: bool, device: torch.device) -> None:
    """See `train.kernels` and `train.compile`.

    Raises:
        UserError: liger-kernel is asked for and cannot run here.
    """
    there = liger.available(device)
    if kernels == "liger" and not there:
        raise UserError(
            f"train.kernels=liger needs a CUDA device and the package liger-kernel, and here is {device.type} "
            f"{'without' if device.type == 'cuda' else 'alone'}: use auto or torch, or install moe_llm[liger]"
        )
    liger.enable(there and kernels != "torch")
    compiled.enable(compile)

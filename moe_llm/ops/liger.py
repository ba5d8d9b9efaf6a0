"""Kernels of the package liger-kernel (Hsu et al. 2024), which others maintain and measure, for CUDA.

This is the only module that imports it; off until `moe_llm.ops.kernels.choose` turns it on. What it has no kernel for stays
torch's: experts' activations with the routing weights in them, and the residual addition before a norm.
Dimensions: T tokens, D hidden, V vocabulary, B batch, S sequence, H query heads, G key-value heads, d head dimension.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

PARTS = ("norm", "rope", "swiglu", "cross_entropy")
enabled = False  # whether `use` may say yes


def enable(on: bool) -> None:
    """From now on `use` says yes where kernels fit, or never."""
    global enabled
    enabled = on


def use(part: str, *tensors: Tensor) -> bool:
    """Whether `part` of these, all of one dtype, goes to its kernel."""
    assert part in PARTS, f"liger-kernel is not asked for {part}"
    first = tensors[0]
    return enabled and available(first.device) and all(t.dtype == first.dtype for t in tensors)


def available(device: torch.device) -> bool:
    """Whether the package is there and runs on the device: CUDA, or in tests Triton's interpreter."""
    return _installed() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `moe_llm.ops.norm.rms_norm`: statistics in fp32, rounded before the weight."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight_D, eps, 0.0, "llama", False)


def rotate(q_BHSd: Tensor, k_BGSd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor) -> tuple[Tensor, Tensor]:
    """As `moe_llm.ops.rope.apply_rotary`."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(q_BHSd, k_BGSd, cos_BSd, sin_BSd)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int) -> Tensor:
    """The summed loss of `moe_llm.ops.cross_entropy.linear_cross_entropy`."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # no bias, weights of classes, z-loss, smoothing or cap; the weight's gradient is summed in fp32 over chunks
    options = (None, None, ignore_index, 0.0, 0.0, "sum", None, False, torch.float32)
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(hidden_TD, weight_VD, labels_T, *options)
    return loss

"""Kernels for CUDA in Triton, compiled on the machine that runs them, at their first use.

None of them has been timed on a GPU yet. They are proven equal to their reference twins in Triton's interpreter
(tests/ops/test_triton.py), and to compile for Ampere and Hopper, to tensor-core products without spilled accumulators
(tests/ops/test_triton_compile.py). Until one is measured to be faster it stays off: `DEFAULT` says which are on, and
`MOE_LLM_TRITON` overrides it: `1` for all, `0` for none, or names such as `experts,norm`.

This module imports without Triton, which comes with torch's CUDA builds for Linux; no other module here does.
"""

import functools
import importlib.util
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from moe_llm.errors import UserError

# part -> on by default, on CUDA. What else does the same is in brackets; it is what `auto` takes today.
DEFAULT = {
    "experts": False,  # the experts' products with what is around them in one kernel each (torch's grouped product)
    "swiglu": False,  # silu(gate) * up * weight, between torch's grouped products (three passes of torch's)
    "gather_sum": False,  # the weighted sum of each token's rows (an embedding bag)
    "norm": False,  # RMSNorm and the residual addition before it (torch's elementwise operations)
    "rope": False,  # (torch's elementwise operations)
    "cross_entropy": False,  # a chunk's loss and the gradient of its logits (torch's elementwise operations)
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_enabled: frozenset[str] | None = None


def use(part: str, first: Tensor, *tensors: Tensor | None) -> bool:
    """Whether `part` is on and these can go to its kernel: see `fits`."""
    return part in (enabled() if _enabled is None else _enabled) and fits(first, *tensors)


def chosen(part: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `part` is on and takes tensors of this dtype on this device."""
    return part in enabled() and _fits(device, dtype)


def fits(first: Tensor, *tensors: Tensor | None) -> bool:
    """Whether these can go to a kernel: on the current CUDA device (or on the CPU under TRITON_INTERPRET=1), all of one
    dtype, fp32, bf16 or fp16, and Triton is there."""
    return all(t is None or t.dtype == first.dtype for t in tensors) and _fits(first.device, first.dtype)


def _fits(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype not in _DTYPES or not available():
        return False
    if device.type == "cuda":
        return device.index in (None, torch.cuda.current_device())
    return device.type == "cpu" and interpreted()


def enable(parts: Iterable[str]) -> None:
    """From now on these parts are on, and no others, whatever the environment says."""
    global _enabled
    _enabled = _known(parts, "enable()")


def enabled() -> frozenset[str]:
    """The parts that are on. UserError where MOE_LLM_TRITON names one that does not exist."""
    global _enabled
    if _enabled is None:
        given = os.environ.get("MOE_LLM_TRITON")
        if given is None:
            _enabled = frozenset(part for part, on in DEFAULT.items() if on)
        elif given in ("0", "1"):
            _enabled = frozenset(DEFAULT if given == "1" else ())
        else:
            _enabled = _known((part.strip() for part in given.split(",")), "MOE_LLM_TRITON")
    return _enabled


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter, which is for tests: it is very slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _known(parts: Iterable[str], source: str) -> frozenset[str]:
    parts = frozenset(parts)
    for part in sorted(parts - set(DEFAULT)):
        raise UserError(f"{source} names {part!r}, which has no Triton kernel; use some of {', '.join(DEFAULT)}.")
    return parts

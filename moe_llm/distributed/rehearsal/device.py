"""A device `cuda` without values: what the code of a GPU run asks of torch is answered, and nothing is computed."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_llm.ops import native


@functools.cache
def _stand_in() -> ctypes.CDLL:
    root = Path(torch.__file__).parent
    flags = (
        "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f'-DTORCH_VERSION="{torch.__version__}"',
    )  # fmt: skip
    return ctypes.CDLL(str(native.build(Path(__file__).with_name("cuda_stand_in.cpp"), flags)))


class TimingEvent:
    """`torch.cuda.Event`, of which it is counted how many exist."""

    made = 0

    def __init__(self, enable_timing: bool = False):
        TimingEvent.made += 1

    def record(self, stream: Any = None) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def elapsed_time(self, end: "TimingEvent") -> float:
        return 1.0


def _attention_as_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the kernels that CUDA takes: flash attention for bf16 and fp16 without a mask, the
    memory-efficient one otherwise. Without a device torch would choose the plain products, whose memory is another."""
    if enable_gqa and query.shape[1] != key.shape[1]:
        # both kernels read each key-value head for several query heads; what they keep is of the smaller shape
        shared = query.shape[1] // key.shape[1]
        key, value = (x[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for x in (key, value))
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    bias = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -1e4)
    bias = None if bias is None else bias.expand(query.shape[0], query.shape[1], -1, -1)
    needs = any(x.requires_grad for x in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs, dropout_p, is_causal, scale=scale
    )[0]


@contextlib.contextmanager
def cuda_without_values(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeTensorMode]:
    """Meanwhile tensors have shapes, dtypes and devices, `cuda` among them, and no values.

    Args:
        capability: the compute capability of the device: (8, 0) Ampere, (9, 0) Hopper, (10, 0) Blackwell.
    """
    installed = False if torch.cuda.is_available() else bool(_stand_in().install())
    TimingEvent.made = 0
    patches: list[Any] = [
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "Event", TimingEvent),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention_as_on_cuda),
    ]
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            # one thread: a device's own would need the device
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            yield stack.enter_context(FakeTensorMode())
    finally:
        if installed:
            _stand_in().uninstall()

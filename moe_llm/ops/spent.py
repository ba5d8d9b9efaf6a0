"""What was kept for a backward pass, and is of no use once that has read it.

Autograd lets go of a function's saved tensors when its backward pass is over. Until then they lie beside the gradients
that it forms, and that is where a training step's memory is at its height.
"""

import ctypes
import functools
import mmap
import os
import sys

import torch
from torch import Tensor

_MADV_DONTNEED = 4
# What glibc unmaps in any case when it is freed; smaller blocks it may hand out again, whose pages would have to be
# fetched anew
_LEAST_BLOCK = 32 * 2**20


def graph_is_kept() -> bool:
    """Whether the running backward pass may be run again (`retain_graph`). To be called within one."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # not in torch's interface
    return asked is None or asked()


def give_back(x: Tensor) -> None:
    """Return the memory of x (contiguous), whose content is lost, to the system; x may be written again. Nothing
    happens where x is no part of a large block on a CPU under Linux."""
    if x.device.type != "cpu" or sys.platform != "linux" or x.untyped_storage().nbytes() < _LEAST_BLOCK:
        return
    size = x.numel() * x.element_size()
    page = mmap.PAGESIZE  # only whole ones: what lies before and after x is not ours
    begin, end = -(-x.data_ptr() // page) * page, (x.data_ptr() + size) // page * page
    if begin < end and _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)

"""Memory that one training step on a CPU has freed, kept for the next.

The C library returns large blocks to the system when they are freed, and the system hands them out again page by page,
each filled with zeros: a step that allocates its activations and gradients anew pays for a hundred thousand pages. And
aligned blocks, as tensors are, leave holes that blocks of the same size do not fit into. So tensors of 64 KiB and more
come from an allocator of our own here (native/allocator.cpp), as they do on CUDA from torch's. It is torch's for the
whole process: other libraries' tensors come from it too. What it keeps is what the process has taken at most, until
`empty_cache`.

It is compiled like the kernels, against the headers that come with torch. `MOE_LLM_CACHING_ALLOCATOR=0` leaves all to
the C library, as does `MOE_LLM_NATIVE=0`, and any system but Linux.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from moe_llm.ops import native

_SOURCE = Path(native.__file__).with_name("allocator.cpp")
_LEAST_BYTES = 2**16


def start() -> bool:
    """Have large CPU tensors come from the allocator from now on. Returns whether they do; where they could but do
    not, a warning says why."""
    if _allocator() is None:
        return False
    _allocator().use(1)
    return True


def stop() -> None:
    """Have tensors come from torch's own allocator again, and return what is kept to the system."""
    if _started() is not None:
        _started().use(0)
        empty_cache()


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Meanwhile tensors come from the allocator, which keeps what is freed for the next time."""
    before = _allocator() is not None and _allocator().use(1)
    try:
        yield
    finally:
        if _allocator() is not None:
            _allocator().use(before)


def empty_cache() -> None:
    """Return what is kept, and in no tensor's use, to the system."""
    error = 0 if _started() is None else _started().empty_cache()
    if error:
        raise OSError(error, f"madvise: {os.strerror(error)}")


def bytes_in_use() -> int:
    """Of the tensors that came from here."""
    return 0 if _started() is None else _started().in_use()


def bytes_reached() -> int:
    """As far as the allocator's memory has been used, with what lies free in between."""
    return 0 if _started() is None else _started().reached()


def _started() -> ctypes.CDLL | None:
    """The allocator where it has been asked for: what only ends or looks compiles nothing (on a GPU it never is)."""
    return _allocator() if _allocator.cache_info().currsize else None


@functools.cache
def _allocator() -> ctypes.CDLL | None:
    unwanted = "0" in (os.environ.get("MOE_LLM_CACHING_ALLOCATOR"), os.environ.get("MOE_LLM_NATIVE"))
    if unwanted or sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(str(native.build(_SOURCE, _flags())))
        library.install.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        library.in_use.restype = library.reached.restype = ctypes.c_size_t
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        error = library.install(_LEAST_BYTES, memory)
        if error:
            raise OSError(error, f"{memory / 2**30:.0f} GiB of addresses: {os.strerror(error)}")
    except (OSError, subprocess.CalledProcessError) as error:
        detail = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        warnings.warn(
            f"the caching allocator is not there, and training on a CPU is slower for it: {detail}; "
            "MOE_LLM_CACHING_ALLOCATOR=0 does without it",
            stacklevel=3,
        )
        return None
    return library


def _flags() -> tuple[str, ...]:
    torch_root = Path(torch.__file__).parent
    return (
        "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{torch_root / 'include'}", f"-L{torch_root / 'lib'}", "-lc10",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f'-DTORCH_VERSION="{torch.__version__}"',  # part of the name under which the library is kept
    )  # fmt: skip

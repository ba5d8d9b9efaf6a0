"""Memory of a CPU step that is freed and allocated again: glibc's malloc is asked to keep it.

As it comes, glibc returns large blocks to the system when they are freed, and the system hands them out again page by page,
each filled with zeros: a step that allocates its activations and gradients anew pays for many thousands of pages. With
higher thresholds (mallopt(3)) blocks of up to 32 MiB, glibc's limit, are kept for the next step. Nothing is replaced: no
hook, no thread, no lock of our own, so forked children are as safe as before. `MALLOC_TRIM_THRESHOLD_` and
`MALLOC_MMAP_THRESHOLD_` in the environment go before.
"""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST_KEPT = 32 * 2**20  # glibc refuses more
_MOST_KEPT = 2**31 - 1  # an int


def keep_freed() -> bool:
    """Have malloc keep what is freed. Returns whether it does: it is glibc's, and the user has not said otherwise."""
    set_by_user = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    if not _is_glibc() or set_by_user:
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and libc.mallopt(_TRIM_THRESHOLD, _MOST_KEPT))


def trim() -> None:
    """Return what is kept and unused to the system: after loading, evaluating and saving, which take what no step needs."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"

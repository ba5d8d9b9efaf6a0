"""Tensors whose elements lie in files, for optimizers that are larger than the host's memory.

The files are mapped into memory, so that whatever works on tensors of the host works on these, and the system keeps of them
what fits and writes the rest to the disk. DeepSpeed's own way to an NVMe drive (Rajbhandari et al. 2021, ZeRO-Infinity)
covers ZeRO-3 alone, and no checkpoint of ours could read its tensors.
"""

import errno
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from moe_llm.errors import UserError

GIB = 2**30


class MappedFiles:
    """Makes tensors in files of one directory. The files have no names there, so that nothing is left behind by a process
    that is killed; they are gone with their tensors."""

    def __init__(self, directory: str):
        self.directory = directory

    def empty_like(self, tensor: Tensor) -> Tensor:
        """fp32 on the CPU, of the same shape, all zero.

        Raises:
            UserError: the directory has no room for it, or cannot be written.
        """
        size = 4 * tensor.numel()
        if not size:
            return torch.zeros(tensor.shape)
        try:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                # all of it now: a full disk would otherwise end the process where it writes to memory
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise UserError(
                f"parallel.nvme_path={self.directory!r} cannot hold {size / GIB:.1f} GiB more of the optimizer "
                f"({error.strerror}): free some, or name another directory"
            ) from error
        mapped.madvise(mmap.MADV_SEQUENTIAL)  # an update goes through it once, from its begin to its end
        return torch.frombuffer(mapped, dtype=torch.float32).view(tensor.shape)


def check_directory(path: str) -> None:
    """Refuse a directory that cannot hold such files, before any work."""
    why = "does not exist" if not Path(path).exists() else "is no directory" if not Path(path).is_dir() else None
    if why is None and not os.access(path, os.W_OK | os.X_OK):
        why = os.strerror(errno.EACCES)
    if not hasattr(os, "posix_fallocate"):  # macOS
        raise UserError(
            "parallel.offload_optimizer=nvme needs a system that reserves room in files, as Linux does: use cpu"
        )
    if why is not None:
        raise UserError(f"parallel.nvme_path={path!r} {why}: name a directory on a fast local disk")

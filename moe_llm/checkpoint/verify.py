"""Every byte of a checkpoint, compared with what was written, and every number looked at."""

import math
from dataclasses import dataclass
from pathlib import Path

from moe_llm.checkpoint.folder import model_config_file
from moe_llm.checkpoint.manifest import has_manifest, read_manifest, verify
from moe_llm.checkpoint.safetensors_io import TensorFiles, read_json
from moe_llm.checkpoint.weights import check_finite
from moe_llm.progress import progress, tracked

_SPAN = 1 << 24  # elements that are looked at together


@dataclass(frozen=True)
class Verified:
    """files: those whose hash is that of the manifest; 0 where the directory has none. tensors, nbytes: all that were
    read and found finite."""

    files: int
    tensors: int
    nbytes: int


def verify_checkpoint(directory: str | Path) -> Verified:
    """Compare all files with the manifest, where there is one, and look for NaN and infinity in all tensors.

    Args:
        directory: of a training checkpoint, or as transformers saves a model.

    Raises:
        UserError: a missing, truncated or altered file, the manifest among them, or a tensor with NaN or infinity; the sentence names it.
    """
    root = Path(directory)
    read_json(model_config_file(root, f"checkpoint {str(root)!r}"))
    files = 0
    if has_manifest(root):
        with progress("hashing"):
            verify(root)
        files = len(read_manifest(root))
    tensors = nbytes = 0
    for folder, stem in _stems(root):
        stored = TensorFiles(folder, stem)
        for name in tracked(stored.names(), f"reading {stem}"):
            nbytes += _check_finite(stored, name)
            tensors += 1
    return Verified(files, tensors, nbytes)


def _stems(root: Path) -> list[tuple[Path, str]]:
    """Each set of tensor files in a checkpoint: its folder, and what its files' names begin with. The model's is one."""
    found = {(root, "model")}
    for file in root.rglob("*.safetensors"):
        stem = file.name.removesuffix(".safetensors")
        head, dash, count = stem.rpartition("-of-")
        found.add((file.parent, head.rpartition("-")[0] if dash and count.isdecimal() else stem))
    return sorted(found)


def _check_finite(stored: TensorFiles, name: str) -> int:
    """The bytes of a tensor, all of whose elements are finite."""
    count = math.prod(stored.shape(name))
    if stored.dtype(name).is_floating_point:
        for start in range(0, count, _SPAN):
            check_finite(stored.read_span(name, start, min(_SPAN, count - start)), name, stored.file(name))
    return count * stored.dtype(name).itemsize

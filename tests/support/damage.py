"""Checkpoints damaged by a seeded generator."""

import random
import shutil
from pathlib import Path

KINDS = ["flip", "flip", "truncate", "remove", "zero", "other run", "duplicate", "swap"]


def damage(checkpoint: Path, other: Path, seed: int, suffixes: tuple[str, ...] | None = None) -> str:
    """Damage one file (two for a swap), drawn by the seed; what was done.

    Args:
        other: a checkpoint of another run or step, with files of the same names.
        suffixes: of the files that are drawn from; None: all.
    """
    rng = random.Random(seed)
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and (suffixes is None or p.suffix in suffixes))
    file, kind = rng.choice(files), rng.choice(KINDS)
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "truncate":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "remove":
        file.unlink()
    elif kind == "zero":
        file.write_bytes(b"\0" * len(content))
    elif kind == "other run":
        shutil.copy(other / file.relative_to(checkpoint), file)
    elif kind == "duplicate":
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    else:
        partner = rng.choice(files)
        swapped = partner.read_bytes()
        partner.write_bytes(content)
        file.write_bytes(swapped)
    return f"seed {seed}: {kind} {file.relative_to(checkpoint)}"

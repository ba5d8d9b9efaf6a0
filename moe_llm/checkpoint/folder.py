"""The directories of a run's checkpoints.

    checkpoints/step-00000100/        complete: the name is given last, by renaming
    checkpoints/latest                symlink to the one saved last
    checkpoints/best                  symlink to that of the lowest validation loss, with early stopping
    checkpoints/.tmp-*                being written or deleted; whatever a dead run left is removed
    checkpoints/step-00000100.old     complete too; exists while a new step 100 takes its place

A run that goes on from an earlier step writes lower step numbers after higher ones, so "newest" goes by a
serial number of the save, not by the step.
"""

import os
import re
import shutil
from pathlib import Path

from moe_llm.checkpoint.manifest import verify
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.errors import UserError

STATE = "trainer/state.json"
LATEST, BEST = "latest", "best"
_COMPLETE = re.compile(r"step-(\d+)(\.old)?")
_TMP = ".tmp-"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def tmp_path(root: Path, step: int) -> Path:
    return root / f"{_TMP}{step_name(step)}"


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first; sound or not, none is left out."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _COMPLETE.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_age, reverse=True)


def next_serial(root: Path) -> int:
    """The number of the next save in this run."""
    return 1 + max((_serial(path) or 0 for path in complete_checkpoints(root)), default=0)


def _serial(path: Path) -> int | None:
    try:
        serial = read_json(path / STATE).get("serial")
    except UserError:
        return None
    return serial if isinstance(serial, int) else None


def _age(path: Path) -> tuple:
    """Sort key. One whose serial cannot be read counts as newest: it is met, and named, before any other."""
    serial = _serial(path)
    return (serial is None, serial or 0, int(_COMPLETE.fullmatch(path.name)[1]))


def remove_leftovers(root: Path) -> None:
    """Remove what saves and deletions that did not finish have left. Only one run may use `root`."""
    for path in root.iterdir():
        superseded = path.name.endswith(".old") and _COMPLETE.fullmatch(path.name) and path.with_suffix("").is_dir()
        if superseded:
            delete(path)
        elif path.name.startswith(_TMP):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def publish(tmp: Path, final: Path) -> None:
    """Give a finished directory its name, and make `latest` point to it.

    At every moment, what was complete before is there under a name that `complete_checkpoints` finds.
    """
    old = final.with_name(final.name + ".old")
    if final.is_dir():
        if old.is_dir():
            delete(old)
        os.rename(final, old)
    os.rename(tmp, final)
    sync_directory(final.parent)
    point(final.parent, LATEST, final.name)
    if old.is_dir():
        delete(old)


def point(root: Path, name: str, target: str) -> None:
    """Make the link `name` point to a checkpoint, in one step."""
    link = root / f"{_TMP}{name}"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    os.replace(link, root / name)
    sync_directory(root)


def prune(root: Path, keep_last: int, best_step: int | None = None) -> None:
    """Delete all but the newest `keep_last`, counting only those whose files have their sizes, and the best one."""
    sound = [path for path in complete_checkpoints(root) if _has_sizes(path)]
    best = None if best_step is None else step_name(best_step)
    for path in sound[keep_last:]:
        if path.name != best:
            delete(path)


def delete(path: Path) -> None:
    """Remove a complete checkpoint: it loses its name first, so that no half of it is ever taken for one."""
    doomed = path.with_name(f"{_TMP}deleted-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _has_sizes(path: Path) -> bool:
    try:
        verify(path, hashes=False)
    except UserError:
        return False
    return True


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_checkpoint_directory(checkpoint: str | Path) -> None:
    """Refuse what is plainly no checkpoint, before anything heavy is imported."""
    if (Path(checkpoint) / "config.json").is_file():
        return
    newest = next(iter(complete_checkpoints(Path(checkpoint) / "checkpoints")), None)
    name = f"such as {newest}" if newest else "such as RUN/checkpoints/step-00000020"
    raise UserError(f"checkpoint {str(checkpoint)!r} holds no config.json: name a checkpoint directory, {name}")

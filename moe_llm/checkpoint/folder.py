"""The directories of a run's checkpoints.

    checkpoints/step-00000100/        complete: the name is given last, by renaming
    checkpoints/checkpoints.json      the order in which they were saved, and which one is the best
    checkpoints/latest                symlink to the one saved last
    checkpoints/best                  symlink to that of the lowest validation loss, with early stopping
    checkpoints/.tmp-*                being written or deleted; whatever a dead run left is removed
    checkpoints/step-00000100.old     complete too; exists while a new step 100 takes its place

A run that resumes from an earlier step writes lower step numbers after higher ones, so "newest" goes by a serial number
of the save, not by the step. checkpoints.json holds the serials by name and by the SHA-256 of the manifest; where it is
missing or wrong, they come from each checkpoint's own state.json, if that is what its manifest says.

What a file system may refuse without harm (links, deletion, fsync of a directory) is tried, and reported once.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from moe_llm.atomic import TEMPORARY, rename_directory, sync_directory, try_or_report, write_atomically
from moe_llm.checkpoint.manifest import MANIFEST, check_file, has_manifest, verify_loadable
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.errors import UserError

STATE = "trainer/state.json"
INDEX = "checkpoints.json"
LATEST, BEST = "latest", "best"
_COMPLETE = re.compile(r"step-(\d+)(\.old)?")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def tmp_path(root: Path, step: int) -> Path:
    return root / f"{TEMPORARY}{step_name(step)}"


# The order of checkpoints


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first; sound or not, none is left out.

    One of which nobody knows when it was saved counts as newest: it is met, and named, before any other.
    """
    serials = _serials(root)
    return sorted(serials, key=lambda path: _age(path, serials[path]), reverse=True)


def next_serial(root: Path) -> int:
    """The number of the next save in this run."""
    listed = [entry["serial"] for entry in _read_index(root)["checkpoints"].values()]
    return 1 + max([*(serial or 0 for serial in _serials(root).values()), *listed], default=0)


def _age(path: Path, serial: int | None) -> tuple[bool, int, int]:
    number = _COMPLETE.fullmatch(path.name)
    assert number is not None
    return (serial is None, serial or 0, int(number[1]))


def _serials(root: Path) -> dict[Path, int | None]:
    """When each complete checkpoint was saved, relative to the others; None where that is unknown."""
    if not root.is_dir():
        return {}
    index = _read_index(root)["checkpoints"]
    found = [path for path in root.iterdir() if _COMPLETE.fullmatch(path.name) and path.is_dir()]
    return {path: _serial(path, index.get(path.name)) for path in found}


def _serial(path: Path, listed: dict[str, Any] | None) -> int | None:
    if listed is not None and listed["manifest"] == _manifest_digest(path):
        return listed["serial"]
    try:
        check_file(path, STATE)
        serial = read_json(path / STATE).get("serial")
        if isinstance(serial, int):
            return serial
    except UserError:
        pass  # a damaged one: only the list can know when it was saved
    return None if listed is None else listed["serial"]


def _manifest_digest(path: Path) -> str | None:
    try:
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _read_index(root: Path) -> dict[str, Any]:
    """The content of checkpoints.json; empty where it is missing or is no such list, since it is made anew then."""
    nothing: dict[str, Any] = {"checkpoints": {}, "best": None}
    try:
        content = json.loads((root / INDEX).read_text(encoding="utf-8"))
        checkpoints = {
            str(name): {"serial": entry["serial"], "manifest": entry["manifest"]}
            for name, entry in content["checkpoints"].items()
            if isinstance(entry["serial"], int)
        }
        return nothing | {"checkpoints": checkpoints, "best": content.get("best")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return nothing


def _write_index(root: Path, best: str | None) -> None:
    serials = _serials(root)
    checkpoints = {
        path.name: {"serial": serial, "manifest": _manifest_digest(path)}
        for path, serial in sorted(serials.items(), key=lambda item: _age(*item))
        if serial is not None
    }
    write_atomically(root / INDEX, json.dumps({"checkpoints": checkpoints, "best": best}, indent=2) + "\n")


# Publishing and deleting


def publish(tmp: Path, final: Path) -> None:
    """Give a finished directory its name, and make `latest` point to it.

    At every moment, what was complete before is there under a name that `complete_checkpoints` finds.
    """
    old = final.with_name(final.name + ".old")
    if final.is_dir():
        if old.is_dir():
            delete(old)
        if old.is_dir():  # it could not be deleted, and its name is needed
            os.rename(old, _unused(old))
        os.rename(final, old)
    rename_directory(tmp, final)
    point(final.parent, LATEST, final.name)
    if old.is_dir():
        delete(old)


def record(root: Path, saved: Path, best_step: int | None = None) -> None:
    """Write checkpoints.json after a save, and let `best` point to the best one."""
    best = None if best_step is None else step_name(best_step)
    _try("checkpoints.json", lambda: _write_index(root, best))
    if best is not None:
        point(root, BEST, best)


def prune(root: Path, keep_last: int, saved: Path, best_step: int | None = None) -> None:
    """Delete all but the newest `keep_last` sound ones, the best one, and `saved`, whatever its age.

    Those that are damaged hold no place: they are deleted too when so many sound ones are newer.
    """
    best = None if best_step is None else step_name(best_step)
    kept = 0
    for path in complete_checkpoints(root):
        whole = _is_sound(path)
        if kept >= keep_last and path.name not in (best, saved.name):
            delete(path)
        kept += whole


def _is_sound(path: Path) -> bool:
    try:
        verify_loadable(path)
    except UserError:
        return False
    return True


def remove_leftovers(root: Path) -> None:
    """Remove what saves and deletions that did not finish have left. Only one run may use `root`."""
    for path in root.iterdir():
        superseded = path.name.endswith(".old") and _COMPLETE.fullmatch(path.name) and path.with_suffix("").is_dir()
        if superseded:
            delete(path)
        elif path.name.startswith(TEMPORARY):
            _try("deletion", partial(shutil.rmtree, path) if path.is_dir() and not path.is_symlink() else path.unlink)


def free_name(tmp: Path) -> None:
    """Make sure that nothing has the name of a checkpoint that is to be written, even where it cannot be deleted."""
    if tmp.exists():
        os.rename(tmp, _unused(tmp))


def _unused(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"{TEMPORARY}left-{number}")).exists():
        number += 1
    return other


def delete(path: Path) -> None:
    """Remove a complete checkpoint: it loses its name first, so that no half of it is ever taken for one.

    Where the file system refuses, that is reported once and left for the next save.
    """
    doomed = path.with_name(f"{TEMPORARY}deleted-{path.name}")

    def work() -> None:
        if doomed.exists():
            os.rename(doomed, _unused(doomed))
        os.rename(path, doomed)
        shutil.rmtree(doomed)

    _try("deletion", work)


# What a file system may refuse


_WITHOUT = {
    "deletion": "an old checkpoint or a left-over stays, and takes space",
    "link": "checkpoints/latest and checkpoints/best are not renewed; resuming does not need them",
    INDEX: "the order of checkpoints is read from each of them",
}


def _try(kind: str, work: Callable[[], None]) -> bool:
    return try_or_report(kind, work, _WITHOUT[kind])


def point(root: Path, name: str, target: str) -> None:
    """Make the link `name` point to a checkpoint, in one step, where the file system has links."""

    def work() -> None:
        if (root / name).is_dir() and not (root / name).is_symlink():  # where a run was copied without its links
            os.rename(root / name, root / f"{name}.copy")
        link = root / f"{TEMPORARY}{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        os.replace(link, root / name)

    if _try("link", work):
        sync_directory(root)


def link_or_copy(file: Path, link: Path) -> None:
    """The same bytes under a second name: a hard link, a symbolic one, or a copy, as the file system allows."""
    try:
        os.link(file, link)
    except OSError:
        try:
            link.symlink_to(os.path.relpath(file, link.parent))
        except OSError:
            shutil.copyfile(file, link)


def probe(root: Path) -> None:
    """Try, before training, what the first save will do, so that what the file system refuses is reported now.

    Raises:
        OSError: directories cannot be made or renamed there, without which no checkpoint can be saved.
    """
    root.mkdir(parents=True, exist_ok=True)
    trial = _unused(root / f"{TEMPORARY}probe")
    trial.mkdir()
    renamed = _unused(trial)
    os.rename(trial, renamed)
    sync_directory(renamed)
    _try("link", lambda: (renamed / "link").symlink_to("nothing"))
    _try("deletion", lambda: shutil.rmtree(renamed))


def check_checkpoint_directory(checkpoint: str | Path) -> None:
    """Refuse what is plainly no checkpoint, or one whose weights are not what was saved, before anything heavy is
    imported.

    Raises:
        UserError: no config.json there; or, of a run's checkpoint, a missing, truncated or altered file.
    """
    model_config_file(checkpoint, f"checkpoint {str(checkpoint)!r}")
    if has_manifest(Path(checkpoint)):
        verify_loadable(Path(checkpoint))


def model_config_file(directory: str | Path, named: str, other: str = "") -> Path:
    """config.json of a model's directory.

    Args:
        named: what the user calls the directory, and its value. other: what may be named besides, for the sentence.

    Raises:
        UserError: there is none; the sentence says what is there, and names a checkpoint nearby.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return directory / "config.json"
    if not directory.exists():
        what = f"is a link to {os.readlink(directory)}, which is gone" if directory.is_symlink() else "does not exist"
    elif not directory.is_dir():
        what = "is a file"
    elif (directory / MANIFEST).is_file():
        what = "has lost its config.json"
    else:
        inside = sorted(path.name for path in directory.iterdir())
        what = (
            f"holds no config.json but {', '.join(inside[:4])}{', ...' * (len(inside) > 4)}" if inside else "is empty"
        )
    raise UserError(f"{named} {what}: name a checkpoint directory, such as {checkpoint_near(directory)}{other}")


def checkpoint_near(directory: Path) -> Path | str:
    """A run's checkpoint that a directory is a part of, or that is near it; else how such a path looks."""
    for place in (directory, *list(directory.absolute().parents)[:3]):
        if (place / MANIFEST).is_file() and (place / "config.json").is_file():
            return place
        for root in (place, place / "checkpoints"):
            with contextlib.suppress(OSError):
                if found := [path for path in complete_checkpoints(root) if (path / "config.json").is_file()]:
                    return found[0]
    return "RUN/checkpoints/step-00000020"

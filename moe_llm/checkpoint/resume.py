"""Which checkpoint a run goes on from, and whether it is the same run at all."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_llm.checkpoint import folder
from moe_llm.checkpoint.digests import reading
from moe_llm.checkpoint.manifest import verify
from moe_llm.checkpoint.ranks import ALONE, Ranks
from moe_llm.config import Config
from moe_llm.config.load import parse_yaml, validate
from moe_llm.errors import UserError

# What a run may change when it goes on: a section, or one key. All else decides what is learned from what.
# The length of the run is free: the schedule is computed from it anew.
FREE = (
    "run.dir",
    "parallel",
    "logging",
    "evaluate",
    "checkpoint",
    "train.max_steps",
    "train.max_tokens",
    "train.micro_batch_size",
    "train.device",
    "train.activation_checkpointing",
    "train.on_nan",
    "train.max_bad_steps",
    "train.spike_threshold",
    "train.hang_timeout_seconds",
    "train.early_stopping",
    "finetune.router_guard.max_kl",
    "data.num_workers",
    "data.cache_dir",
    "data.allow_changed",
)
# What a checkpoint may be resumed with in another run's directory, reported and recorded: how it is trained from here on.
REPORTED = ("optim", "train", "finetune", "distill")
# What the hash of the tokenizer and the fingerprint of the data compare better than the settings that led to them.
BY_CONTENT = ("tokenizer", "model.vocab_size", "model.init_from")
_DATA_PATH = re.compile(r"data\.(validation_)?sources\.\d+\.path(\.\d+)?")


def find_resumable(
    root: str | Path,
    *,
    report: Callable[[str], None],
    ranks: Ranks = ALONE,
    hashes: bool = True,
    before: Path | None = None,
) -> Path | None:
    """The newest sound checkpoint of a run; None where there is none. Collective over `ranks`.

    Args:
        root: the run's `checkpoints` directory.
        report: told on rank 0, in one sentence, of each newer one that is unsound, and why.
        hashes: compare every file's SHA-256, shared out among the ranks; False: not those of tensors, whose blocks
            `load_checkpoint` compares while it reads them.
        before: only checkpoints that are older than this one.
    """
    candidates = ranks.gather(folder.complete_checkpoints(Path(root)))[0]  # all ranks go by one listing
    if before in candidates:
        candidates = candidates[candidates.index(before) + 1 :]
    for path in candidates:
        try:
            verify(path, ranks, hashes=hashes)
        except UserError as error:
            if ranks.rank == 0:
                report(passed_over(path, error))
        else:
            return path
    return None


def passed_over(path: Path, why: UserError) -> str:
    return f"checkpoint {path.name} is passed over: {str(why).removesuffix(': use another checkpoint')}"


def check_same_run(old_config_text: str, new: Config) -> None:
    """Refuse to go on with a configuration that is another run's.

    Args:
        old_config_text: YAML of the resolved configuration that the run was started with. A key that it lacks
            had its default then.
        new: `model.vocab_size` may not be resolved yet.

    Raises:
        UserError: the first key that differs and may not, with both values and the remedy.
    """
    origin = f"the configuration saved in {new.run.dir}"
    before, now = _both(old_config_text, origin, new, "set another run.dir")
    # to be taken from the tokenizer, which is compared itself
    if new.model.vocab_size is None or new.model.resize_embeddings:
        before.pop("model.vocab_size", None)
        now.pop("model.vocab_size", None)
    for key in _differing(before, now):
        of_data = _within(key, ("data",))
        if not (of_data and new.data.allow_changed):
            raise UserError(
                f"{key}={_show(now, key)} differs from {_show(before, key)}, with which the run in "
                f"{new.run.dir} was started: set it back"
                + (", allow it with data.allow_changed=true" if of_data else "")
                + ", or set another run.dir"
            )


def compare_with_checkpoint(path: Path, new: Config) -> list[str]:
    """What differs between the configuration of a checkpoint and that of the run that resumes from it, one clause for
    each setting that may.

    Raises:
        UserError: a setting differs that decides what the model is or what it reads.
    """
    file = path / "trainer/config.yaml"
    with reading(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    before, now = _both(text, f"file {file}", new, "use the version of moe_llm that wrote it")
    changed = []
    for key in _differing(before, now):
        clause = f"{key}={_show(now, key)} in place of {_show(before, key)}"
        if _within(key, BY_CONTENT) or _DATA_PATH.fullmatch(key):
            continue
        if _within(key, REPORTED) or (new.data.allow_changed and _within(key, ("data",))):
            changed.append(clause)
            continue
        remedy = (
            "or allow it with data.allow_changed=true"
            if _within(key, ("data",))
            else f"or begin another run from its weights with model.init_from={path}"
        )
        raise UserError(f"checkpoint {str(path)!r} is of a run with another setting: {clause}: set it back, {remedy}")
    return changed


def _both(old: str, origin: str, new: Config, remedy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a saved configuration, which is YAML, and of a run's, by dotted keys."""
    raw = parse_yaml(old, origin)
    try:
        saved = validate(raw if isinstance(raw, dict) else {})
    except UserError as error:
        raise UserError(f"{origin} cannot be read by this version ({error}): {remedy}") from error
    return _flat(saved.model_dump(mode="json")), _flat(new.model_dump(mode="json"))


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = [*now, *(key for key in before if key not in now)]
    return [key for key in keys if not _within(key, FREE) and before.get(key) != now.get(key)]


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _show(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "nothing"


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists by dotted keys; list items by index, as overrides name them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {key: value}
    flat = {key: value} if not value and key else {}  # an empty list is a value too
    for name, inner in items:
        flat |= _flat(inner, f"{key}.{name}" if key else str(name))
    return flat

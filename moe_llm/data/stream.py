"""Text that is read while it is trained on: hub datasets, and files of object storage or of any file system that fsspec
knows. Nothing but the position is kept: `datasets` says where a stream is, exactly, and goes on from there.
"""

import contextlib
import glob
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_llm.config import SourceConfig
from moe_llm.data.kinds import kind_by_name
from moe_llm.errors import UserError

_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "text": "text"}


class Cursor(NamedTuple):
    """Where a stream is. epoch: how often it has been read; state: of `datasets`, None for the begin."""

    epoch: int = 0
    state: dict[str, Any] | None = None


def stream_files(source: SourceConfig, field: str) -> list[tuple[str, int]]:
    """Address and size of each file of a stream of files, sorted within each pattern.

    Raises:
        UserError: nothing there, or a file system that is not installed or cannot be reached.
    """
    import fsspec

    found: dict[str, int] = {}
    for pattern in source.paths:
        try:
            system, path = fsspec.url_to_fs(pattern if "://" in pattern else str(Path(pattern).expanduser()))
            names = sorted(system.glob(path)) if glob.has_magic(path) else [path]
            infos = [system.info(name) for name in names]
        except (OSError, ValueError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{field}.path={pattern} cannot be read ({reason}): check it and its access") from error
        files = [info for info in infos if info["type"] == "file"]
        if not files:
            raise UserError(f"{field}.path={pattern} matches no file: check the pattern")
        files = [info for info in files if info.get("size") != 0]  # `datasets` stops at an empty one; None is unknown
        if not files:
            raise UserError(f"{field}.path={pattern} matches empty files alone: name files that hold text")
        found |= {system.unstrip_protocol(info["name"]): int(info.get("size") or 0) for info in files}
    return list(found.items())


@contextlib.contextmanager
def loading(source: SourceConfig, field: str) -> Iterator[None]:
    """Turn what `datasets` cannot read into a sentence."""
    import datasets
    import pyarrow

    try:
        yield
    except (
        OSError,
        ValueError,
        LookupError,
        RuntimeError,
        EOFError,
        StopIteration,
        zlib.error,
        lzma.LZMAError,
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'no reason given'}"
        if source.type == "files":
            what, remedy = f"{field}.path={source.path}", "repair or remove the file that this is of"
        else:
            what = f"{field}.path={source.path} (name={source.name}, split={source.split})"
            remedy = "check the name and the connection, or use local files"
        raise UserError(f"{what} cannot be loaded ({reason}): {remedy}") from error


class DocumentStream:
    """The rows' texts of a streaming source, epoch after epoch.

    Args:
        cursor: where to go on.
        field: name of the source in the configuration, for errors.
    """

    def __init__(self, source: SourceConfig, field: str, cursor: Cursor = Cursor()):  # noqa: B008 - it is immutable
        self._source, self._field, self.epoch = source, field, cursor.epoch
        with loading(source, field):
            self._rows = _open(source, field)
            if cursor.state is not None:
                self._rows.load_state_dict(cursor.state)

    def read_epoch(self) -> Iterator[dict[str, Any]]:
        """The rows that are left of this epoch; the next one begins behind them."""
        yield from self._rows
        self.epoch += 1
        self._rows = _open(self._source, self._field)

    def cursor(self) -> Cursor:
        """Behind the last row that has been read."""
        return Cursor(self.epoch, self._rows.state_dict())


def _open(source: SourceConfig, field: str) -> Any:
    import datasets

    if source.type == "hub":
        path = str(Path(str(source.path)).expanduser())
        return datasets.load_dataset(path, name=source.name, split=source.split, streaming=True)
    files = [address for address, _ in stream_files(source, field)]
    name = files[0].rpartition("/")[2]
    kind = source.format if source.format != "auto" else kind_by_name(name)
    options: dict[str, Any] = {"sep": "\t"} if kind == "tsv" else {}
    if kind == "text":
        options = {"sample_by": "line" if source.document == "line" else "document"}
    return datasets.load_dataset(_BUILDERS[kind], data_files=files, split="train", streaming=True, **options)

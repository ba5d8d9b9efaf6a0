"""Sources of text: a `SourceConfig` becomes a stream of documents, in a fixed order.

Everything is streamed: what is held in memory is one document, and a text file that is one document
is taken in segments, so files may be larger than memory. jsonl and parquet are read directly (a bad line
is named by file and line); `datasets` is loaded for hub sources alone, because importing it takes seconds.
"""

import csv
import glob
import hashlib
import io
import json
import logging
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moe_llm.config import Config, SourceConfig
from moe_llm.data.kinds import file_kind, looks_like_rows, open_unpacked
from moe_llm.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SEGMENT_BYTES = 4 * 2**20  # a larger text file is several documents, cut at line ends
HASHED_BYTES = 64 * 2**20  # sources up to this size are recognised by content, larger ones by size and date
_STDLIB_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def named_sources(config: Config) -> list[tuple[str, SourceConfig]]:
    """Training sources with the names that errors use, in order."""
    return [(f"data.sources.{i}", source) for i, source in enumerate(config.data.sources)]


def named_validation_sources(config: Config) -> list[tuple[str, SourceConfig]]:
    sources = config.data.validation_sources
    return [(f"data.validation_sources.{i}", source) for i, source in enumerate(sources)]


def check_sources(config: Config) -> None:
    """Refuse sources whose files do not exist or are all empty; reads no text, so it is instant.

    Raises:
        UserError: names field, path and remedy.
    """
    for field, source in named_sources(config) + named_validation_sources(config):
        if source.type != "hub":
            list_files(source, field)


def _path_key(field: str) -> str:
    """The key of a source's path; other than those of a list, as in data.sources.0, a source is its path."""
    return f"{field}.path" if field.rpartition(".")[2].isdecimal() else field


def list_files(source: SourceConfig, field: str) -> list[Path]:
    """Files of a `files` or `python_stdlib` source, sorted within each pattern, none twice."""
    if source.type == "python_stdlib":
        return _stdlib_files()
    patterns = [source.path] if isinstance(source.path, str) else source.path
    found: dict[Path, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_expand(pattern, field)))
    files = list(found)
    try:
        empty = not any(path.stat().st_size for path in files)
    except OSError as error:
        raise UserError(f"{_path_key(field)}={source.path}: {error}") from error
    if empty:
        which = f"the file {files[0]} is" if len(files) == 1 else f"all {len(files)} files are"
        raise UserError(f"{_path_key(field)}={source.path}: {which} empty, name files that hold text")
    return files


def _expand(pattern: str, field: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        example = f"{pattern.rstrip('/')}/**/*.txt"
        raise UserError(f"{_path_key(field)}={pattern} is a directory: name its files, such as {example}")
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        raise UserError(f"{_path_key(field)}={pattern} does not exist: give a file or a pattern like data/*.txt")
    files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise UserError(
            f"{_path_key(field)}={pattern} matches no file: check the pattern (** goes into subdirectories)"
        )
    return files


def _stdlib_files() -> list[Path]:
    """The running interpreter's own library, without its tests: about 12 MB of Python source."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if not _STDLIB_LEFT_OUT & set(path.relative_to(root).parts[:-1]) and path.is_file()
    ]
    return sorted(files)


def source_bytes(source: SourceConfig, field: str) -> int | None:
    """Size of a source's files in bytes, None where it is unknown (hub); for progress bars."""
    return None if source.type == "hub" else sum(path.stat().st_size for path in list_files(source, field))


def source_settings(source: SourceConfig, *left_out: str) -> dict[str, Any]:
    """What a source says, as JSON values. Keys that came later are left out where they say nothing, so that what was made
    of a source before is found again."""
    later = (["content"] if source.content == "text" else []) + (["columns"] if source.columns is None else [])
    return source.model_dump(mode="json", exclude={*left_out, *later})


def fingerprint(source: SourceConfig, field: str) -> list:
    """What tells one state of a source's text from another, as JSON values.

    Files are known by name, size and, up to 64 MiB in all, content, so that a copy of them counts as the
    same text; beyond that by modification time. A hub dataset is known by its name, configuration and split.
    """
    settings = source_settings(source, "weight", "path")
    if source.type == "hub":
        local = Path(source.path).expanduser()
        files = sorted(p for p in local.rglob("*") if p.is_file()) if local.is_dir() else []
        return [settings, source.path, [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]]
    files = list_files(source, field)
    stats = [path.stat() for path in files]
    if sum(stat.st_size for stat in stats) <= HASHED_BYTES:
        marks: list = []
        for path in files:
            try:
                marks.append(hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError as error:
                raise UserError(f"{field}: {path} cannot be read: {error.strerror}") from error
    else:
        marks = [stat.st_mtime_ns for stat in stats]
    return [settings, [[path.name, stat.st_size, mark] for path, stat, mark in zip(files, stats, marks)]]


def read_documents(source: SourceConfig, field: str) -> Iterator[str]:
    """The documents of a source in order, each non-empty and encodable as UTF-8.

    Args:
        field: name of the source in the configuration, for errors, e.g. "data.sources.0".

    Raises:
        UserError: unreadable, undecodable or malformed text, by file and line or byte; no text at all.
    """
    count = 0
    documents = _hub_documents(source, field) if source.type == "hub" else _file_documents(source, field)
    for text in documents:
        if not text:
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{field}: document {count} holds half of a surrogate pair at character {error.start}, "
                "which is no Unicode text: repair or remove that document"
            ) from error
        count += 1
        yield text
    if not count:
        raise UserError(f"{field}: {source.path or source.type} holds no text: name files with non-empty documents")


def read_records(source: SourceConfig, field: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of each row of jsonl, parquet or a hub dataset.

    Args:
        columns: those that are wanted; a row has what there is of them and may have others.

    Raises:
        UserError: unreadable or malformed rows, by file and line; files of another kind.
    """
    if source.type == "hub":
        return _hub_records(source, field)
    return _from_files(source, field, lambda path: _records_of_file(path, source, field, columns))


def _file_documents(source: SourceConfig, field: str) -> Iterator[str]:
    _check_column_applies(source, field)
    return _from_files(source, field, lambda path: _documents_of_file(path, source, field))


def _check_column_applies(source: SourceConfig, field: str) -> None:
    """Refuse a column of text for files of which none has columns."""
    if source.type != "files" or source.text_field == type(source).model_fields["text_field"].default:
        return
    files = list(_from_files(source, field, lambda path: iter([(path, file_kind(path, source.format))])))
    if all(k == "text" and (source.format == "text" or looks_like_rows(p) is None) for p, k in files):
        raise UserError(
            f"{_text_key(field)}={source.text_field} applies to no file: {files[0][0]} is plain text, which has no "
            "columns: remove it, or name files with rows"
        )


def _from_files(source: SourceConfig, field: str, read: Callable[[Path], Iterator[T]]) -> Iterator[T]:
    for path in list_files(source, field):
        try:
            yield from read(path)
        except UnicodeDecodeError as error:
            if source.type == "python_stdlib":
                continue  # a handful of legacy-encoded modules in some distributions
            raise UserError(
                f"{field}: {path} is not UTF-8 at {error.reason}: convert it, e.g. with iconv, or remove it"
            ) from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{field}: {path} cannot be read ({reason}): replace or remove it") from error


def _records_of_file(
    path: Path, source: SourceConfig, field: str, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = file_kind(path, source.format)
    if kind == "text" and source.format == "auto" and (rows := looks_like_rows(path)):
        kind, _ = rows
    if kind == "text":
        raise UserError(f"{field}: {path} holds no rows: set {field}.format to jsonl, json, csv or parquet")
    return _rows(path, kind, columns, field)


def _documents_of_file(path: Path, source: SourceConfig, field: str) -> Iterator[str]:
    kind, column = file_kind(path, source.format), source.text_field
    if source.type == "python_stdlib":
        return _segments(path)
    if kind == "text":
        rows = looks_like_rows(path) if source.format == "auto" else None
        if rows is not None and "text_field" in source.model_fields_set:
            raise UserError(
                f"{_text_key(field)}={column} applies to no text, and {path} is one by its name, though it looks like "
                f"{rows[1]}: {_as_format(field, rows[0])}, or remove text_field"
            )
        if rows is not None:
            logger.warning(
                "%s: %s is read as text and looks like %s: %s to read its %s column",
                field, path, rows[1], _as_format(field, rows[0]), column,
            )  # fmt: skip
        return _lines(path) if source.document == "line" else _segments(path)
    rows = _rows(path, kind, [column], field)
    return (_text_of(record, column, where, field) for where, record in rows)


def _rows(path: Path, kind: str, columns: Sequence[str], field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if kind == "parquet":
        return _parquet(path, columns, field)
    return {"jsonl": _jsonl, "json": _json_array, "csv": _csv, "tsv": _csv}[kind](path, field)


def _decode(data: bytes, offset: int, where: str = "") -> str:
    """UTF-8 to text; the error's `reason` says where in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = where or f"byte {offset + error.start}"
        raise UnicodeDecodeError("utf-8", data, error.start, error.end, position) from error


def _segments(path: Path) -> Iterator[str]:
    """The whole file as one document, or, above `SEGMENT_BYTES`, as several that end at line ends."""
    with open_unpacked(path) as file:
        rest, offset = b"", 0
        while True:
            data = rest + file.read(SEGMENT_BYTES - len(rest))
            last = len(data) < SEGMENT_BYTES
            cut = len(data) if last else _cut_point(data)
            text = _decode(data[:cut], offset)
            yield text.removeprefix("\ufeff") if offset == 0 else text
            if last:
                return
            rest, offset = data[cut:], offset + cut


def _cut_point(data: bytes) -> int:
    line_end = data.rfind(b"\n") + 1
    if line_end:
        return line_end
    cut = len(data) - 1
    while len(data) - cut < 4 and data[cut] & 0xC0 == 0x80:  # continuation bytes of a character
        cut -= 1
    return cut


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_unpacked(path) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, 0, f"line {number}")
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _lines(path: Path) -> Iterator[str]:
    for _, line in _numbered_lines(path):
        yield line.rstrip("\r\n")


def _jsonl(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        record = _parsed(line, f"{field}: {path}, line {number}", "repair that line")
        if not isinstance(record, dict):
            raise UserError(f"{field}: {path}, line {number} is no JSON object: give it named columns")
        yield f"{path}, line {number}", record


def _parsed(text: str, where: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error.msg}): {remedy}") from error
    except RecursionError:
        raise UserError(f"{where} is nested too deeply: {remedy}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{where} holds a number that cannot be read ({error}): {remedy}") from error


def _json_array(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file that is one JSON array of objects, which is read whole."""
    with open_unpacked(path) as file:
        text = _decode(file.read(), 0).removeprefix("\ufeff")
    rows = _parsed(text, f"{field}: {path}", "repair it, or give one object a line as .jsonl")
    if not isinstance(rows, list):
        raise UserError(f"{field}: {path} is no JSON array: give a list of objects, or one object a line as .jsonl")
    for number, record in enumerate(rows, start=1):
        if not isinstance(record, dict):
            raise UserError(f"{field}: {path}, row {number} is no JSON object: give it named columns")
        yield f"{path}, row {number}", record


def _csv(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table whose first line names the columns; separated by commas or, by its content, tabs or semicolons."""
    with open_unpacked(path) as file:
        first = file.readline().decode("utf-8", errors="replace")
    separator = max(",\t;", key=first.count)
    csv.field_size_limit(2**31 - 1)
    with open_unpacked(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=separator)
        try:
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise UserError(f"{field}: {where} has not as many values as there are columns: repair that line")
                yield where, record
        except csv.Error as error:
            raise UserError(f"{field}: {path}, line {reader.line_num} is no CSV ({error}): repair that line") from error


def _text_of(record: dict, text_field: str, where: str, field: str) -> str:
    if text_field not in record:
        raise _no_column(where, text_field, list(record), field)
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{field}: {where}: {text_field!r} holds {json.dumps(text, default=str)[:40]} where text is "
            f"expected: set {_text_key(field)} to a column of strings, or remove such rows"
        )
    return text


def _text_key(field: str) -> str:
    """What users set the column of the text with: a key of a source, or an option of the command line."""
    return "--text-field" if field.startswith("--") else f"{field}.text_field"


def _as_format(field: str, format: str) -> str:
    """How users say what a file is."""
    return f"name it *.{format}" if field.startswith("--") else f"set {field}.format to {format}"


def _no_column(where: str, text_field: str, columns: list[str], field: str) -> UserError:
    chat = "messages" in columns or {"prompt", "completion"} <= set(columns)
    return UserError(
        f"{_text_key(field)}={text_field} is no column of {where}: "
        f"it has {', '.join(map(str, columns)) or 'none'}, choose one of them"
        + (f" or set {field}.content=chat" if chat and not field.startswith("--") else "")
    )


def _parquet(path: Path, columns: Sequence[str], field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with those of the columns that are there, or, where none of several is, with all."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(columns) == 1 and columns[0] not in names:
                raise _no_column(str(path), columns[0], names, field)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[c for c in columns if c in names] or names):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{field}: {path} is not a readable parquet file ({_first_line(error)}): write it again"
        ) from error


def _hub_documents(source: SourceConfig, field: str) -> Iterator[str]:
    for where, record in _hub_records(source, field):
        yield _text_of(record, source.text_field, where, field)


def _hub_records(source: SourceConfig, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets
    import pyarrow

    path = Path(source.path).expanduser()
    try:
        if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):  # by `save_to_disk`
            saved = datasets.load_from_disk(str(path))
            rows = saved[source.split] if isinstance(saved, dict) else saved
        else:
            rows = datasets.load_dataset(str(path), name=source.name, split=source.split, streaming=True)
        for row, record in enumerate(rows):
            yield f"{source.path}, row {row}", record
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        EOFError,
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise UserError(
            f"{field}.path={source.path} (name={source.name}, split={source.split}) cannot be loaded "
            f"({type(error).__name__}: {_first_line(error)}): check the name and the connection, "
            "or use local files"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]

"""Sources of text: a `SourceConfig` becomes a stream of documents, in a fixed order.

Everything is streamed: what is held in memory is one document (`moe_llm.data.rows` reads files). `datasets` is loaded for
hub sources alone, because importing it takes seconds.
"""

import contextlib
import glob
import hashlib
import json
import logging
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

from moe_llm.config import Config, SourceConfig
from moe_llm.data.files import remember
from moe_llm.data.hashes import file_hashes
from moe_llm.data.kinds import beside_tokens, companion, file_kind, looks_like_rows, token_kind
from moe_llm.data.pieces import Piece, Place, grouped, shard_bytes
from moe_llm.data.rows import divided, documents_of, records_of, text_key, text_of, tokens_of
from moe_llm.data.stream import DocumentStream, loading, stream_files
from moe_llm.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STDLIB_LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def named_sources(config: Config) -> list[tuple[str, SourceConfig]]:
    """Training sources with the names that errors use, in order."""
    return [(f"data.sources.{i}", source) for i, source in enumerate(config.data.sources)]


def named_validation_sources(config: Config) -> list[tuple[str, SourceConfig]]:
    sources = config.data.validation_sources
    return [(f"data.validation_sources.{i}", source) for i, source in enumerate(sources)]


def check_sources(config: Config) -> None:
    """Refuse sources whose files do not exist or are all empty, and tokens of an unknown tokenizer; reads no text, so it
    is instant.

    Raises:
        UserError: names field, path and remedy.
    """
    for field, source in named_sources(config) + named_validation_sources(config):
        if source.streaming and source.type == "files":
            stream_files(source, field)
        elif source.type == "files":  # not of Python's own library, in which links may stand
            _report_read_twice(list_files(source, field), field)
        if holds_tokens(source, field) and config.tokenizer.path is None:
            raise UserError(
                f"{field} holds tokens, and their tokenizer is not known: set tokenizer.path to the one that they were made "
                "with"
            )


def _report_read_twice(files: Sequence[Path], field: str) -> None:
    """Warn of a file that is named twice, as by a link beside it: what it holds then counts twice."""
    names: dict[Path, Path] = {}
    for path in files:
        other = names.setdefault(path.resolve(), path)
        if other != path:
            logger.warning("%s: %s and %s are one file, which is read twice: name it once", field, other, path)
            return


def _path_key(field: str) -> str:
    """The key of a source's path; other than those of a list, as in data.sources.0, a source is its path."""
    return f"{field}.path" if field.rpartition(".")[2].isdecimal() else field


def list_files(source: SourceConfig, field: str) -> list[Path]:
    """Files of a `files` or `python_stdlib` source, sorted within each pattern, none twice."""
    if source.type == "python_stdlib":
        return _stdlib_files()
    found: dict[Path, None] = {}
    for pattern in source.paths:
        found.update(dict.fromkeys(_expand(pattern, field)))
    beside = {file for path in found for file in beside_tokens(path)}
    files = [path for path in found if path not in beside]
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
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(
            f"{_path_key(field)}={pattern} is a pipe or a device, which can be read only once: write what it gives to a file"
        )
    if not glob.has_magic(pattern):
        raise UserError(f"{_path_key(field)}={pattern} does not exist: give a file or a pattern like data/*.txt")
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    gone = next((p for p in found if p.is_symlink() and not p.exists()), None)
    if gone is not None:
        raise UserError(
            f"{_path_key(field)}={pattern} matches {gone}, a link to {os.readlink(gone)}, which is not there: bring it "
            "back, or remove the link"
        )
    files = [p for p in found if p.is_file()]
    if not files:
        raise UserError(
            f"{_path_key(field)}={pattern} matches no file: check the pattern (** goes into subdirectories)"
        )
    return files


def holds_tokens(source: SourceConfig, field: str) -> bool:
    """Whether a source's files are tokens already.

    Raises:
        UserError: some are, and others hold text.
    """
    if source.type != "files" or source.streaming:
        return False
    files = list_files(source, field)
    kinds = {token_kind(path, source.format) for path in files}
    if len(kinds) > 1 and None in kinds:
        text = next(path for path in files if token_kind(path, source.format) is None)
        raise UserError(f"{field} has files of tokens and others, such as {text}: give each kind a source of its own")
    return None not in kinds


def _stdlib_files() -> list[Path]:
    """The running interpreter's own library, without its tests: about 12 MB of Python source."""
    files = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in _STDLIB_LEFT_OUT]  # site-packages may be far larger
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(path for path in files if path.is_file())


def source_bytes(source: SourceConfig, field: str) -> int | None:
    """Size of a source's files in bytes, None where it is unknown (hub); for progress bars."""
    return (
        None
        if source.type == "hub" or source.streaming
        else sum(path.stat().st_size for path in list_files(source, field))
    )


def source_settings(source: SourceConfig, *left_out: str) -> dict[str, Any]:
    """What a source says, as JSON values. Keys that came later are left out where they say nothing, so that what was made
    of a source before is found again."""
    later = (["content"] if source.content == "text" else []) + (["columns"] if source.columns is None else [])
    later += [] if source.streaming else ["streaming"]
    return source.model_dump(mode="json", exclude={*left_out, *later})


def fingerprint(source: SourceConfig, field: str, cache: Path) -> list:
    """What tells one state of a source's text from another, as JSON values.

    Files, those of a local dataset among them, are known by name, size and content, so that a copy of them counts as the
    same text. A dataset of the hub is known by its name, configuration and split.

    Args:
        cache: where the hashes of large files are remembered.
    """
    settings = source_settings(source, "weight", "path")
    if source.streaming and source.type == "files":
        return [settings, [list(file) for file in stream_files(source, field)]]
    if source.type == "hub" and local_dataset(source) is None:
        return [settings, source.path, []]
    return [settings, [list(record) for record in file_records(source, field, cache)]]


def file_records(source: SourceConfig, field: str, cache: Path) -> list[tuple[str, int, str]]:
    """Name, size and SHA-256 of each file of a source that lies on this machine."""
    files, folder = files_here(source, field), local_dataset(source)
    names = [path.name if folder is None else path.relative_to(folder).as_posix() for path in files]
    hashes = file_hashes(files, field, cache)
    return [(name, path.stat().st_size, digest) for name, path, digest in zip(names, files, hashes)]


def files_here(source: SourceConfig, field: str) -> list[Path]:
    """The files of this machine that a source is read from: those of a local dataset, and indices of token files too."""
    folder = local_dataset(source)
    if folder is not None:
        return sorted(path for path in folder.rglob("*") if path.is_file())
    if source.type == "hub" or source.streaming:
        return []
    files = list_files(source, field)
    if not holds_tokens(source, field):
        return files
    both = [file for path in files for file in (path, companion(path, file_kind(path, source.format)))]
    return [file for file in both if file.is_file()]


def local_dataset(source: SourceConfig) -> Path | None:
    """The directory of a source of type hub that is one of this machine's."""
    path = Path(str(source.path)).expanduser()
    return path if source.type == "hub" and path.is_dir() else None


def hub_listing(source: SourceConfig, field: str, cache: Path) -> list[str]:
    """Addresses of the files that the hub's dataset has for a source, each with the revision that it is of. They are asked
    for once and remembered in the cache, beside tokens that are not fetched again either.

    Raises:
        UserError: the hub cannot be reached, or knows no such dataset.
    """
    asked = hashlib.sha256(json.dumps([source.path, source.name, source.split]).encode()).hexdigest()
    file = cache / f"listing-{asked[:24]}.json"
    if file.is_file():
        return list(json.loads(file.read_text(encoding="utf-8")))
    import datasets

    with loading(source, field):
        builder = datasets.load_dataset_builder(str(source.path), name=source.name)
        files = builder.config.data_files or {}
    addresses = sorted(str(address) for split, found in files.items() if split == source.split for address in found)
    remember(file, json.dumps(addresses).encode())
    return addresses


def shards_of(source: SourceConfig, field: str) -> list[list[Piece]]:
    """What a source is tokenised in, in order: it follows from the source alone."""
    if source.type == "hub":
        return _hub_shards(source, field)
    files = list_files(source, field)
    most = shard_bytes(sum(path.stat().st_size for path in files))
    with _reading(field):
        return grouped((piece for path in files for piece in divided(path, source, most, field)), most)


def read_documents(source: SourceConfig, field: str, pieces: Sequence[Piece] | None = None) -> Iterator[str]:
    """The documents of a source in order, each non-empty and encodable as UTF-8.

    Args:
        field: name of the source in the configuration, for errors, e.g. "data.sources.0".
        pieces: those that are read, of `shards_of`; None: all.

    Raises:
        UserError: unreadable, undecodable or malformed text, by file and line or byte; no text at all.
    """
    count = 0
    if source.streaming:
        documents = stream_texts(DocumentStream(source, field), source, field)
    elif source.type == "hub":
        documents = _hub_documents(source, field, pieces)
    else:
        if pieces is None:
            _check_column_applies(source, field)
        documents = _from_pieces(source, field, pieces, lambda piece: documents_of(piece, source, field))
    for text in documents:
        if not text:
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = f" of those from {pieces[0].path} on" if pieces else ""
            raise UserError(
                f"{field}: document {count}{where} holds half of a surrogate pair at character {error.start}, "
                "which is no Unicode text: repair or remove that document"
            ) from error
        count += 1
        yield text
    if not count and pieces is None:
        raise no_text(source, field)


def read_token_documents(source: SourceConfig, field: str, pieces: Sequence[Piece] | None = None) -> Iterator[str]:
    """The documents of a source of token files, as text of ids (`moe_llm.data.token_files`); none is empty."""
    found = _from_pieces(source, field, pieces, lambda piece: tokens_of(piece, source, field))
    return (text for text in found if text)


def stream_texts(stream: DocumentStream, source: SourceConfig, field: str) -> Iterator[str]:
    """The texts that are left of an epoch of a stream; none is empty.

    Raises:
        UserError: rows without text, or a stream that cannot be read.
    """
    with loading(source, field):
        for row, record in enumerate(stream.read_epoch()):
            text = text_of(record, source.text_field, f"{source.path}, row {row} of those read here", field)
            if text:
                yield text


def no_text(source: SourceConfig, field: str) -> UserError:
    where = f"{field}: {source.path or source.type}"
    if source.content == "preference":
        return UserError(
            f"{where} holds no pairs to learn from: name files with rows whose chosen and rejected answers differ"
        )
    if source.content == "chat":
        return UserError(
            f"{where} holds no row that is learned: name files with conversations that their weight, train and label do not "
            "leave out"
        )
    return UserError(f"{where} holds no text: name files with non-empty documents")


def read_records(
    source: SourceConfig, field: str, columns: Sequence[str], pieces: Sequence[Piece] | None = None
) -> Iterator[tuple[Place | str, dict[str, Any]]]:
    """(where it stands, row) of each row of jsonl, parquet or a hub dataset.

    Args:
        columns: those that are wanted; a row has what there is of them and may have others.
        pieces: those that are read, of `shards_of`; None: all.

    Raises:
        UserError: unreadable or malformed rows, by file and line; files of another kind.
    """
    if source.type == "hub":
        return _hub_records(source, field, pieces)
    return _from_pieces(source, field, pieces, lambda piece: records_of(piece, source, field, columns))


def _check_column_applies(source: SourceConfig, field: str) -> None:
    """Refuse a column of text for files of which none has columns."""
    if source.type != "files" or source.text_field == type(source).model_fields["text_field"].default:
        return
    with _reading(field):
        files = [(path, file_kind(path, source.format)) for path in list_files(source, field)]
        plain = all(k == "text" and (source.format == "text" or looks_like_rows(p) is None) for p, k in files)
    if plain:
        raise UserError(
            f"{text_key(field)}={source.text_field} applies to no file: {files[0][0]} is plain text, which has no "
            "columns: remove it, or name files with rows"
        )


def _from_pieces(
    source: SourceConfig, field: str, pieces: Sequence[Piece] | None, read: Callable[[Piece], Iterator[T]]
) -> Iterator[T]:
    for piece in chain.from_iterable(shards_of(source, field)) if pieces is None else pieces:
        with _reading(field, piece.path):
            try:
                yield from read(piece)
            except UnicodeDecodeError as error:
                if source.type == "python_stdlib":
                    continue  # a handful of legacy-encoded modules in some distributions
                raise UserError(
                    f"{field}: {piece.path} is not UTF-8 at {error.reason}: convert it, e.g. with iconv, or remove it"
                ) from error


@contextlib.contextmanager
def _reading(field: str, path: Path | None = None) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason, name = getattr(error, "strerror", None) or error, path or getattr(error, "filename", None)
        raise UserError(f"{field}: {name} cannot be read ({reason}): replace or remove it") from error


def _hub_documents(source: SourceConfig, field: str, pieces: Sequence[Piece] | None) -> Iterator[str]:
    for where, record in _hub_records(source, field, pieces):
        yield text_of(record, source.text_field, where, field)


def _hub_records(
    source: SourceConfig, field: str, pieces: Sequence[Piece] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    with loading(source, field):
        rows = _hub_rows(source)
        if pieces is None:
            for row, record in enumerate(rows):
                yield f"{source.path}, row {row}", record
            return
        for piece in pieces:
            if piece.whole:
                part, begin, where = rows, 0, str(source.path)
            elif hasattr(rows, "select"):
                assert piece.end is not None, "shares of saved rows have both ends"
                part, begin, where = rows.select(range(piece.begin, piece.end)), piece.begin, str(source.path)
            else:
                part, begin = rows.shard(num_shards=rows.num_shards, index=piece.begin), 0
                where = f"{source.path}, file {piece.begin}"
            for row, record in enumerate(part, start=begin):
                yield f"{where}, row {row}", record


def _hub_rows(source: SourceConfig) -> Any:
    """A dataset that was saved with `save_to_disk`, or one of the hub or a directory, as a stream."""
    import datasets

    path = Path(str(source.path)).expanduser()
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(path))
        return saved[source.split] if isinstance(saved, dict) else saved
    return datasets.load_dataset(str(path), name=source.name, split=source.split, streaming=True)


def _hub_shards(source: SourceConfig, field: str) -> list[list[Piece]]:
    """One for each file that the dataset is stored as, or, of what is saved locally, for equal shares of its rows."""
    path = Path(str(source.path))
    with loading(source, field):
        rows = _hub_rows(source)
        if not hasattr(rows, "select"):
            return (
                [[Piece(path, 0, i, i + 1)] for i in range(rows.num_shards)]
                if rows.num_shards > 1
                else [[Piece(path, 0)]]
            )
        size = rows.data.nbytes
        count = max(1, min(len(rows), round(size / shard_bytes(size))))
        edges = [len(rows) * i // count for i in range(count + 1)]
        return [[Piece(path, size // count, a, b)] for a, b in pairwise(edges)] if count > 1 else [[Piece(path, size)]]

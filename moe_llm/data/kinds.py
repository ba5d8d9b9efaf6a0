"""What kind of file a file is, by its content and its ending, and how it is opened."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from pathlib import Path
from typing import IO, Any

_PACKINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_MAGIC = (
    (rb"\x1f\x8b\x08", "gzip"), (rb"\x28\xb5\x2f\xfd", "zstd"), (rb"BZh[1-9](1AY&SY|\x17rE8P)", "bz2"),
    (rb"\xfd7zXZ\x00", "xz"),
)  # fmt: skip
# First bytes of files that hold neither text nor rows that are read here: words for them, and what to do with them.
_FOREIGN = (
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive", "unpack it"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (rb"Rar!\x1a\x07", "a rar archive", "unpack it"),
    (rb"(?s).{257}ustar", "a tar archive", "unpack it"),
    (rb"\x04\x22M\x18", "packed with lz4", "unpack it, or pack it with gzip or zstd"),
    (rb"\xff\x06\x00\x00sNaPpY", "packed with snappy", "unpack it, or pack it with gzip or zstd"),
    (rb"\x1f[\x9d\xa0]", "packed with compress", "unpack it, or pack it with gzip or zstd"),
    (
        rb"ARROW1\x00\x00|\xff\xff\xff\xff",
        "an Arrow file",
        "write it as parquet, or read the dataset's folder with type: hub",
    ),
    (rb"ORC[^ -~]", "an ORC file", "write it as parquet"),
    (rb"Obj\x01", "an Avro file", "write it as parquet"),
    (rb"\x89HDF", "an HDF5 file", "write it as parquet"),
    (rb"SQLite format 3", "a SQLite database", "write its rows as parquet or jsonl"),
    (rb"\x93NUMPY", "a NumPy array", "write its rows as parquet or jsonl"),
    (rb"\x80[\x02-\x05]", "a pickle", "write its rows as parquet or jsonl"),
    (rb"%PDF-", "a PDF", "extract its text"),
    (rb"\xd0\xcf\x11\xe0", "an old Office document", "extract its text"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", "convert it to UTF-8, e.g. with iconv"),
)
_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
TOKEN_KINDS = ("megatron", "datatrove")
_PEEKED = 1 << 16  # bytes by which a file's content is recognised
_BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark and white space, before the first row
_ROWS_OF_JSON = re.compile(rb'(\[\s*)?\{\s*"')
_NAME = re.compile(r"[A-Za-z_][\w .-]{0,39}")  # of a column


def token_kind(path: Path, format: str = "auto") -> str | None:
    """megatron or datatrove for a file of tokens; None for one of text or rows."""
    if format != "auto":
        return format if format in TOKEN_KINDS else None
    if path.suffix == ".ds":
        return "datatrove"
    return "megatron" if path.suffix == ".bin" and companion(path, "megatron").is_file() else None


def companion(path: Path, kind: str) -> Path:
    """The index beside a file of tokens."""
    return path.with_suffix(".idx") if kind == "megatron" else path.with_name(f"{path.name}.index")


def beside_tokens(path: Path) -> list[Path]:
    """What stands beside a file of tokens and is no source: index, metadata and mask of the loss."""
    if path.suffix == ".ds":
        return [path.with_name(f"{path.name}.{ending}") for ending in ("index", "metadata", "loss")]
    return [path.with_suffix(".idx")] if path.suffix == ".bin" else []


def file_kind(path: Path, format: str = "auto") -> str:
    """text, jsonl, json (an array of rows), csv, tsv, parquet or a kind of token files: as `data.sources.N.format` says, or
    by content and ending (in any case)."""
    tokens = token_kind(path, format)
    if format != "auto" or tokens is not None:
        return tokens or format
    kind, begin = kind_by_name(path.name), _peek(path)
    if begin.startswith(b"PAR1"):
        return "parquet"
    begin = begin.lstrip(_BLANK)
    if kind in ("json", "jsonl"):  # an array of rows or lines of them, whatever its name says
        return "json" if begin.startswith(b"[") else "jsonl"
    if kind != "text" and _ROWS_OF_JSON.match(begin):
        return "json" if begin.startswith(b"[") else "jsonl"
    return kind


def foreign_kind(path: Path) -> tuple[str, str] | None:
    """Words for a file that holds neither text nor rows that are read here, and what to do with it; None for others."""
    begin = _peek(path)
    for first, words, remedy in _FOREIGN:
        if re.match(first, begin):
            return words, remedy
    return None if _packing(begin) is None else ("packed twice", "unpack it once")


def kind_by_name(name: str) -> str:
    """The kind that a file's ending says."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in _PACKINGS:
        suffixes.pop()
    return _BY_SUFFIX.get(suffixes[-1] if suffixes else "", "text")


def _peek(path: Path) -> bytes:
    with open_unpacked(path) as file:
        return file.read(_PEEKED)


def _begin(path: Path) -> bytes:
    return _peek(path).lstrip(_BLANK)


def holds_zero_bytes(path: Path) -> bool:
    """Whether a file's begin is what no text in UTF-8 is, though it can be decoded: tokens, or UTF-16 of plain letters."""
    begin = _peek(path)
    return begin.count(0) * 10 >= max(len(begin), 1)


def looks_like_rows(path: Path) -> tuple[str, str] | None:
    """What the first lines of a file that is taken for text look like: the format, and words for it. None for text."""
    begin = _begin(path)
    if begin.startswith(b"[") and begin[1:].lstrip().startswith(b"{"):
        return "json", "a JSON array of rows"
    lines = begin.splitlines()
    whole = lines if len(begin) < _PEEKED else lines[:-1] or lines
    try:
        objects = [json.loads(line) for line in whole[:3] if line.strip()]
    except (ValueError, RecursionError):
        objects = []
    if objects and all(isinstance(item, dict) for item in objects):
        return "jsonl", "JSON lines"
    for format, separator in (("csv", ","), ("tsv", "\t"), ("csv", ";")):
        if _is_table(whole, separator):
            return format, "a table"
    return None


def _is_table(lines: list[bytes], separator: str) -> bool:
    """Whether the first line names columns and those behind it have as many values; prose has names for columns only where
    it is a list of words, and not in every line as many."""
    text = b"\n".join(lines[:20]).decode("utf-8", errors="replace")
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=separator) if row]
    except csv.Error:
        return False
    if len(lines) > 20:
        rows = rows[:-1]  # it may be cut within quotes
    if len(rows) < 3 or len(rows[0]) < 2:
        return False
    names = [name.strip() for name in rows[0]]
    named = len(set(names)) == len(names) and all(_NAME.fullmatch(name) for name in names)
    return named and all(len(row) == len(names) for row in rows)


def packing_of(path: Path) -> str | None:
    """How a file is packed: by its first bytes, or else by its ending; None for one that is not. One that its ending calls
    packed and that begins as text was unpacked on its way here, as browsers do it."""
    with path.open("rb") as file:
        first = file.read(16)
    named = _PACKINGS.get(path.suffix.lower())
    return _packing(first) or (None if first and _is_text(first) else named)


def _packing(first: bytes) -> str | None:
    return next((name for magic, name in _MAGIC if re.match(magic, first)), None)


def _is_text(first: bytes) -> bool:
    """Whether bytes are printable UTF-8, the last character of which may be cut."""
    text = first.decode("utf-8", errors="ignore").lstrip("\ufeff")
    whole = len(first) - len(first.decode("utf-8", errors="ignore").encode("utf-8")) < 4
    return whole and all(character.isprintable() or character in "\t\r\n" for character in text)


def open_unpacked(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked if it is packed."""
    packing = packing_of(path)
    if packing is None:
        return path.open("rb")
    if packing == "zstd":
        import pyarrow  # which brings a decompressor along; the standard library has none before Python 3.14

        return io.BufferedReader(_Raw(pyarrow.input_stream(str(path), compression="zstd")))
    opener: Any = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}[packing]
    return opener(path, "rb")


class _Raw(io.RawIOBase):
    """A stream of pyarrow's as one of Python's, for lines."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()

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
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
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
    kind = kind_by_name(path.name)
    if kind in ("json", "jsonl"):  # an array of rows or lines of them, whatever its name says
        return "json" if _begin(path).startswith(b"[") else "jsonl"
    return "parquet" if kind == "text" and _peek(path).startswith(b"PAR1") else kind


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
    return _peek(path).lstrip(b"\xef\xbb\xbf \t\r\n")


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
    """How a file is packed: by its ending, or else by its first bytes; None for one that is not."""
    packing = _PACKINGS.get(path.suffix.lower())
    if packing is None:
        with path.open("rb") as file:
            first = file.read(6)
        packing = next((name for magic, name in _MAGIC.items() if first.startswith(magic)), None)
    return packing


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

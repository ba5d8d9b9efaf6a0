"""Files as rows and documents: text, JSON lines and arrays, tables and parquet, packed or not.

What is held in memory is one document; a text file that is one document is taken in segments, so files may be larger
than memory. A bad line is named by file and line. Files are read whole or in pieces (`moe_llm.data.pieces`).
"""

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_llm.config import SourceConfig
from moe_llm.data.kinds import (
    TOKEN_KINDS,
    file_kind,
    foreign_kind,
    holds_zero_bytes,
    looks_like_rows,
    open_unpacked,
    packing_of,
    token_kind,
)
from moe_llm.data.pieces import Piece, Place, bounds, by_bytes, by_items
from moe_llm.data.shapes import from_table, shape_of
from moe_llm.data.token_files import divided_tokens, token_documents
from moe_llm.errors import UserError

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 4 * 2**20  # a larger text file is several documents, cut at line ends


def records_of(
    piece: Piece, source: SourceConfig, field: str, columns: Sequence[str]
) -> Iterator[tuple[Place | str, dict[str, Any]]]:
    """(where it stands, row) of each row of a piece."""
    path = piece.path
    _check_readable(piece, source, field)
    kind = file_kind(path, source.format)
    if kind == "text" and source.format == "auto" and (rows := looks_like_rows(path)):
        kind, _ = rows
    if kind == "text" or kind in TOKEN_KINDS:
        raise UserError(f"{field}: {path} holds no rows: set {field}.format to jsonl, json, csv or parquet")
    found = _rows(piece, kind, columns, field)
    if kind in ("csv", "tsv"):
        return ((where, from_table(record, source.columns)) for where, record in found)
    return found


def documents_of(piece: Piece, source: SourceConfig, field: str) -> Iterator[str]:
    """The documents of a piece."""
    path = piece.path
    kind, column = file_kind(path, source.format), source.text_field
    if kind in TOKEN_KINDS:
        raise UserError(
            f"{field}: {path} holds tokens, and text is needed here: name the text that they were made from"
        )
    if source.type == "python_stdlib":
        return _segments(piece)
    _check_readable(piece, source, field)
    if kind == "text":
        if source.format == "auto" and not piece.begin and holds_zero_bytes(path):
            raise UserError(
                f"{field}: {path} holds a zero byte in every tenth place or more, as tokens and UTF-16 do and text in UTF-8 "
                f"does not: convert it, bring the .idx of Megatron's tokens, or {_as_format(field, 'text')} to read it as it is"
            )
        rows = looks_like_rows(path) if source.format == "auto" and not piece.begin else None
        if rows is not None and "text_field" in source.model_fields_set:
            raise UserError(
                f"{text_key(field)}={column} applies to no text, and {path} is one by its name, though it looks like "
                f"{rows[1]}: {_as_format(field, rows[0])}, or remove text_field"
            )
        if rows is not None:
            logger.warning(
                "%s: %s is read as text and looks like %s: %s to read its %s column",
                field, path, rows[1], _as_format(field, rows[0]), column,
            )  # fmt: skip
        return _lines(piece) if source.document == "line" else _segments(piece)
    found = _rows(piece, kind, [column], field)
    return (text_of(record, column, where, field) for where, record in found)


def _check_readable(piece: Piece, source: SourceConfig, field: str) -> None:
    foreign = None if piece.begin or source.format == "text" else foreign_kind(piece.path)
    if foreign is not None:
        raise UserError(f"{field}: {piece.path} is {foreign[0]}, which is not read here: {foreign[1]}")


def tokens_of(piece: Piece, source: SourceConfig, field: str) -> Iterator[str]:
    """The documents of a piece of a token file, as text of ids."""
    return token_documents(piece, file_kind(piece.path, source.format), field)


def _rows(piece: Piece, kind: str, columns: Sequence[str], field: str) -> Iterator[tuple[Place | str, dict[str, Any]]]:
    if kind == "parquet":
        return _parquet(piece, columns, field)
    if kind == "jsonl":
        return _jsonl(piece, field)
    return _json_array(piece.path, field) if kind == "json" else _csv(piece.path, kind, field)


def _decode(data: bytes, offset: int, place: Place | None = None) -> str:
    """UTF-8 to text; the error's `reason` says where in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = f"byte {offset + error.start}" if place is None else place.line
        raise UnicodeDecodeError("utf-8", data, error.start, error.end, position) from error


def _segments(piece: Piece) -> Iterator[str]:
    """A piece as one document, or, above `SEGMENT_BYTES`, as several that end at line ends."""
    with open_unpacked(piece.path) as file:
        offset, stop = bounds(file, piece, SEGMENT_BYTES)
        if not piece.whole:
            file.seek(offset)
        rest = b""
        while True:
            room = SEGMENT_BYTES if stop is None else min(SEGMENT_BYTES, stop - offset)
            data = rest + file.read(room - len(rest))
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


def _placed_lines(piece: Piece) -> Iterator[tuple[Place, str]]:
    with open_unpacked(piece.path) as file:
        begin, stop = bounds(file, piece)
        if not piece.whole:
            file.seek(begin)
        at = begin
        for number, line in enumerate(file, start=1):
            if stop is not None and at >= stop:
                return
            place = Place(piece.path, begin, number)
            text = _decode(line, 0, place)
            at += len(line)
            yield place, text.removeprefix("\ufeff") if begin == 0 and number == 1 else text


def _lines(piece: Piece) -> Iterator[str]:
    for _, line in _placed_lines(piece):
        yield line.rstrip("\r\n")


def _jsonl(piece: Piece, field: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    for place, line in _placed_lines(piece):
        if not line.strip():
            continue
        ends_open = line.rstrip() in ("{", "[") or line.rstrip().endswith((",", "{", "["))
        remedy = "give each row a line of its own, or a JSON array of rows" if ends_open else "repair that line"
        record = _parsed(line, place, field, remedy)
        if not isinstance(record, dict):
            raise UserError(f"{field}: {place} is no JSON object: give it named columns")
        yield place, record


def _parsed(text: str, where: Path | Place, field: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{field}: {where} is not valid JSON ({error.msg}): {remedy}") from error
    except RecursionError:
        raise UserError(f"{field}: {where} is nested too deeply: {remedy}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{field}: {where} holds a number that cannot be read ({error}): {remedy}") from error


def _json_array(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file that is one JSON array of objects, which is read whole."""
    with open_unpacked(path) as file:
        text = _decode(file.read(), 0).removeprefix("\ufeff")
    rows = _parsed(text, path, field, "repair it, or give one object a line as .jsonl")
    if not isinstance(rows, list):
        raise UserError(f"{field}: {path} is no JSON array: give a list of objects, or one object a line as .jsonl")
    for number, record in enumerate(rows, start=1):
        if not isinstance(record, dict):
            raise UserError(f"{field}: {path}, row {number} is no JSON object: give it named columns")
        yield f"{path}, row {number}", record


def _csv(path: Path, kind: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table whose first line names the columns; separated by commas or, by its content, tabs or semicolons."""
    with open_unpacked(path) as file:
        first = re.sub('"[^"]*"', "", file.readline().decode("utf-8", errors="replace"))
    separator = "\t" if kind == "tsv" and "\t" in first else max(",\t;", key=first.count)
    csv.field_size_limit(2**31 - 1)
    with open_unpacked(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=separator)
        try:
            names = list(reader.fieldnames or [])
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise UserError(f"{field}: {path} has the column {twice[0]!r} more than once: give each its own name")
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise UserError(f"{field}: {where} has not as many values as there are columns: repair that line")
                yield where, record
        except csv.Error as error:
            raise UserError(f"{field}: {path}, line {reader.line_num} is no CSV ({error}): repair that line") from error
        except UnicodeDecodeError as error:
            error.reason = f"line {reader.line_num + 1} or soon behind it"
            raise


def text_of(record: dict, text_field: str, where: Place | str, field: str) -> str:
    """The text of a row."""
    if text_field not in record:
        raise _no_column(where, text_field, list(record), field)
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{field}: {where}: {text_field!r} holds {json.dumps(text, default=str)[:40]} where text is "
            f"expected: set {text_key(field)} to a column of strings, or remove such rows"
        )
    return text


def text_key(field: str) -> str:
    """What users set the column of the text with: a key of a source, or an option of the command line."""
    return "--text-field" if field.startswith("--") else f"{field}.text_field"


def _as_format(field: str, format: str) -> str:
    """How users say what a file is."""
    return f"name it *.{format}" if field.startswith("--") else f"set {field}.format to {format}"


def _no_column(where: Place | str, text_field: str, columns: list[str], field: str) -> UserError:
    chat = shape_of(dict.fromkeys(map(str, columns), True)) is not None
    otherwise = " or " + ("evaluate with --chat" if field.startswith("--") else f"set {field}.content=chat")
    key, there = text_key(field), ", ".join(map(str, columns))
    if not there:
        problem, remedy = (
            f"{field}: {where} has no column {text_field!r}, and no other",
            "give rows with a column of text",
        )
    elif text_field == SourceConfig.model_fields["text_field"].default:  # which the user need not have asked for
        problem = f"{field}: {where} has no column {text_field!r}"
        remedy = f"{'give' if field.startswith('--') else 'set'} {key} {'with' if field.startswith('--') else 'to'} "
        remedy += f"one of {there}" if len(columns) > 1 else there
    else:
        problem, remedy = f"{key}={text_field} is no column of {where}", f"it has {there}, choose one of them"
    return UserError(f"{problem}: {remedy}" + otherwise * chat)


def _parquet(piece: Piece, columns: Sequence[str], field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with those of the columns that are there, or, where none of several is, with all."""
    import pyarrow
    import pyarrow.parquet

    path = piece.path
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(columns) == 1 and columns[0] not in names:
                raise _no_column(str(path), columns[0], names, field)
            groups = range(piece.begin, file.num_row_groups if piece.end is None else piece.end)
            row = sum(file.metadata.row_group(group).num_rows for group in range(piece.begin))
            wanted = [c for c in columns if c in names] or names
            for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{field}: {path} is not a readable parquet file ({first_line(error)}): write it again"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def divided(path: Path, source: SourceConfig, most: int, field: str) -> list[Piece]:
    """A file in pieces of about `most` bytes, as far as it can be read from another place than its begin."""
    size = path.stat().st_size
    if token_kind(path, source.format) is not None:
        return divided_tokens(path, file_kind(path, source.format), most, field)
    if size <= most + most // 2 or packing_of(path) is not None or source.type == "python_stdlib":
        return [Piece(path, size)]
    kind = file_kind(path, source.format)
    if kind in ("text", "jsonl"):
        return by_bytes(path, size, most)
    if kind == "parquet":
        return by_items(path, _row_group_bytes(path), most)
    return [Piece(path, size)]


def _row_group_bytes(path: Path) -> list[int]:
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowException:
        return [path.stat().st_size]  # who reads it says what is wrong with it
    return [found.row_group(group).total_byte_size for group in range(found.num_row_groups)]

"""Tables as rows of chat, and files that are packed, renamed or of kinds that are not read: by content, or refused by name."""

import gzip
import io
import json
import tarfile
import zipfile

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from moe_llm.config import SourceConfig
from moe_llm.data.chat import read_examples
from moe_llm.data.preference import read_pairs
from moe_llm.data.sources import read_documents
from moe_llm.errors import UserError

FIELD = "data.sources.0"
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def source(tmp_path, name: str, data: bytes, **settings) -> SourceConfig:
    (tmp_path / name).write_bytes(data)
    return SourceConfig(type="files", path=str(tmp_path / name), **settings)


def quoted(value) -> str:
    return '"' + json.dumps(value).replace('"', '""') + '"'


def test_a_table_of_chat_has_weights_labels_and_empty_cells(tmp_path):
    table = "prompt,completion,weight,label,system,tools\nhi,yes,1,true,,\nhi,no,0,,be kind,\nhi,worse,1.0,False,,\n"
    [found] = read_examples(source(tmp_path, "x.csv", table.encode(), content="chat"), FIELD)
    assert (found.messages, found.tools) == (TURNS, None)


def test_a_mapped_column_of_a_table_may_be_empty(tmp_path):
    given = source(tmp_path, "x.csv", b"q,a,w\nhi,yes,\n", content="chat",
                   columns={"prompt": "q", "completion": "a", "weight": "w"})  # fmt: skip
    assert [found.messages for found in read_examples(given, FIELD)] == [TURNS]


@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.jsonl"])
def test_turns_and_tools_may_be_json_text(tmp_path, name):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    said = [*TURNS[:1], TURNS[1] | {"tool_calls": json.dumps(calls)}]
    row = {"messages": json.dumps(said), "tools": json.dumps([{"name": "f"}])}
    (tmp_path / name).write_text(
        f"messages,tools\n{quoted(said)},{quoted([{'name': 'f'}])}\n" if name == "x.csv" else json.dumps(row)
    )
    if name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
    given = SourceConfig(type="files", path=str(tmp_path / name), content="chat")
    [found] = read_examples(given, FIELD)
    assert found.messages == [TURNS[0], TURNS[1] | {"tool_calls": calls}]
    assert found.tools == [{"name": "f"}]


def test_an_instruction_that_begins_with_a_bracket_stays_text(tmp_path):
    rows = b'{"prompt": "[INST] hi", "completion": "[1, 2]"}\n'
    [found] = read_examples(source(tmp_path, "x.jsonl", rows, content="chat"), FIELD)
    assert [turn["content"] for turn in found.messages] == ["[INST] hi", "[1, 2]"]


def test_preferences_of_a_table_are_read(tmp_path):
    [pair] = read_pairs(
        source(tmp_path, "x.csv", b"prompt,chosen,rejected,weight\nq,a,b,\n", content="preference"), FIELD
    )
    assert pair.chosen.text == "qa"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("quoted.csv", b'"a; b; c",text\n1,one\n'),
        ("commas.tsv", b"a, b, c\ttext\n1\tone\n"),
        ("semicolons.csv", b'"a,b,c,d";text\n1;one\n'),
    ],
)
def test_the_separator_is_that_of_the_names_not_one_within_them(tmp_path, name, table):
    assert list(read_documents(source(tmp_path, name, table, text_field="text"), FIELD)) == ["one"]


def test_a_column_that_is_there_twice_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x\.csv has the column 'text' more than once"):
        list(read_documents(source(tmp_path, "x.csv", b"text,text\none,two\n"), FIELD))


def test_a_table_that_is_no_utf8_is_named_by_its_line(tmp_path):
    with pytest.raises(UserError, match=r"x\.csv is not UTF-8 at line 1 or soon behind it"):
        list(read_documents(source(tmp_path, "x.csv", "text,n\nnaïve,1\n".encode("latin-1")), FIELD))


ROW = b'{"text": "one"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unpacked.jsonl.gz", ROW),  # as a browser saves it
        ("gzip.jsonl.zst", gzip.compress(ROW, mtime=0)),
        ("lines.csv", ROW),
        ("array.csv", b"[" + ROW + b"]"),
        ("lines.parquet", ROW),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_content_decides_against_a_wrong_name(tmp_path, name, content):
    assert list(read_documents(source(tmp_path, name, content), FIELD)) == ["one"]


def test_parquet_under_any_name_is_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "x.jsonl")
    assert list(read_documents(SourceConfig(type="files", path=str(tmp_path / "x.jsonl")), FIELD)) == ["one"]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "words")
    return buffer.getvalue()


def tarred(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"words"))
    return buffer.getvalue()


def feather() -> bytes:
    buffer = io.BytesIO()
    pyarrow.feather.write_feather(pyarrow.table({"text": ["one"]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", zipped(), "a zip archive, which is not read here: unpack it"),
        ("x.jsonl", zipped(), "a zip archive"),
        ("x.tar", tarred("w"), "a tar archive"),
        ("x.tar.gz", tarred("w:gz"), "a tar archive"),
        ("x.arrow", feather(), "an Arrow file, which is not read here: write it as parquet"),
        ("x.txt.gz", gzip.compress(gzip.compress(b"words", mtime=0), mtime=0), "packed twice"),
        ("x.txt", "words".encode("utf-16"), "UTF-16 text"),
        ("x.pdf", b"%PDF-1.4\nwords", "a PDF"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_other_kinds_are_refused_by_what_they_are(tmp_path, name, content, words):
    with pytest.raises(UserError, match=rf"{name} is {words}"):
        list(read_documents(source(tmp_path, name, content), FIELD))


@pytest.mark.parametrize(
    "text", ["ORCHESTRA plays\n", "PK is short\n", "BZh9 is no archive\n", "Obj\n", "a\0b in text\n"]
)
def test_words_that_begin_as_other_kinds_do_are_text(tmp_path, text):
    assert list(read_documents(source(tmp_path, "x.txt", text.encode()), FIELD)) == [text]


def test_rows_over_several_lines_are_told_how_to_be_written(tmp_path):
    with pytest.raises(UserError, match=r"line 1 is not valid JSON .*give each row a line of its own, or a JSON array"):
        list(read_documents(source(tmp_path, "x.json", json.dumps({"text": "one"}, indent=1).encode()), FIELD))


@pytest.mark.parametrize("row", [{"conversations": []}, {"instruction": "a", "output": "b"}, {"chosen": "a"}])
def test_rows_of_chat_under_content_text_are_offered_chat(tmp_path, row):
    with pytest.raises(UserError, match=r"or set data\.sources\.0\.content=chat"):
        list(read_documents(source(tmp_path, "x.jsonl", json.dumps(row).encode()), FIELD))

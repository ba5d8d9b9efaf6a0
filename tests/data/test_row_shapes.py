"""Rows are recognised by shape, named at the start, or mapped; files are told apart by content."""

import gzip
import json
from copy import deepcopy

import pyarrow
import pyarrow.parquet
import pytest

from moe_llm.config import SourceConfig
from moe_llm.data.chat import read_examples
from moe_llm.data.loader import load_data
from moe_llm.data.shapes import describe_shapes
from moe_llm.data.sources import read_documents
from moe_llm.errors import UserError

FIELD = "data.sources.0"


def source(tmp_path, rows: list[dict], columns=None, name: str = "rows.jsonl") -> SourceConfig:
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceConfig(type="files", path=str(tmp_path / name), content="chat", columns=columns)


def said(given: SourceConfig) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in found.messages] for found in read_examples(given, FIELD)]


ASKED = [("user", "hi"), ("assistant", "yes")]
MAPPED = {
    "prompt and completion": ({"question": "hi", "answer": "yes"}, {"prompt": "question", "completion": "answer"}),
    "over columns of its own names": (
        {"prompt": "unused", "q": "hi", "a": "yes"}, {"prompt": "q", "completion": "a"},
    ),
    "swapped": ({"completion": "hi", "prompt": "yes"}, {"prompt": "completion", "completion": "prompt"}),
    "Alpaca": ({"task": "hi", "result": "yes"}, {"instruction": "task", "output": "result"}),
    "turns with fields of their own": (
        {"dialogue": [{"speaker": "human", "say": "hi"}, {"speaker": "bot", "say": "yes"}]},
        {"messages": "dialogue", "role": "speaker", "content": "say"},
    ),
    "preferences": ({"q": "hi", "better": "yes", "worse": "no"}, {"prompt": "q", "chosen": "better"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("kind", MAPPED)
def test_columns_are_mapped(tmp_path, kind, name):
    row, columns = MAPPED[kind]
    assert said(source(tmp_path, [row], columns, name)) == [ASKED]


def test_a_mapped_column_that_is_not_there_is_named(tmp_path):
    given = source(tmp_path, [{"question": "hi", "answer": "yes"}], {"prompt": "q", "completion": "answer"})
    with pytest.raises(
        UserError, match=r"has no column 'q', which data\.sources\.0\.columns\.prompt names: it has ques"
    ):
        said(given)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"content": "text", "columns": {"prompt": "q"}}, "text_field"),
        ({"content": "chat", "columns": {"x": "q"}}, "x"),
    ],
)
def test_columns_that_mean_nothing_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SourceConfig(type="files", path="x.jsonl", **settings)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "hi", "output": "yes", "system": "be kind"}, [("system", "be kind"), *ASKED]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "system": "be kind"},
         [("system", "be kind"), *ASKED]),
        ({"instruction": "hi", "output": "yes", "history": [["a", "b"]]}, [("user", "a"), ("assistant", "b"), *ASKED]),
        ({"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, ASKED),
    ],
)  # fmt: skip
def test_what_rows_have_beside_their_turns_is_kept(tmp_path, row, expected):
    assert said(source(tmp_path, [row])) == [expected]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("mark", [{"label": False}, {"train": False}, {"weight": 0}])
def test_rows_that_are_not_to_be_learned_are_left_out(tmp_path, mark, name):
    rows = [{"prompt": "hi", "completion": "no", **mark}, {"prompt": "hi", "completion": "yes"}]
    assert said(source(tmp_path, rows, name=name)) == [ASKED]


def test_a_run_names_the_shapes_at_each_start(make_config, tokenizer, tmp_path):
    rows = [{"instruction": f"hi {i}", "output": "yes"} for i in range(12)]
    rows += [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": f"{i}"}]} for i in range(6)]
    given = source(tmp_path, rows)
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    config = make_config(
        [given.model_dump()], data={"sources": [given.model_dump()], "validation_fraction": 0.2, "sequence_length": 64}
    )
    for _ in range(2):
        found = {part.split: dict(part.shapes) for part in load_data(config, tokenizer, show_progress=False).statistics}
        total = {shape: found["train"].get(shape, 0) + found["validation"].get(shape, 0) for shape in found["train"]}
        assert total == {"instruction and output": 12, "conversations": 6}
    assert describe_shapes({"messages": 5}, 1) == "5 rows read as lists of messages, of which 1 is held out"
    assert describe_shapes({"messages": 1200}, 12) == "1,200 rows read as lists of messages, of which 12 are held out"
    line = describe_shapes(total)
    assert line == "12 rows read as Alpaca's instruction and output, 6 rows read as ShareGPT's conversations"


TABLE = "text,other\none,1\ntwo,2\nthree,3\n"


@pytest.mark.parametrize(("name", "text"), [("x.txt", TABLE), ("x", TABLE.replace(",", "\t")), ("x.log", TABLE)])
def test_a_table_under_a_name_of_text_is_told_of(tmp_path, caplog, name, text):
    (tmp_path / name).write_text(text)
    path = str(tmp_path / name)
    assert list(read_documents(SourceConfig(type="files", path=path), FIELD)) == [text]
    assert "looks like a table" in caplog.text
    with pytest.raises(UserError, match="looks like a table"):
        list(read_documents(SourceConfig(type="files", path=path, text_field="text"), FIELD))


@pytest.mark.parametrize(
    "text", ["Dear Sir,\nyes, no, and so on.\n", "def f(a, b):\n    return a, b\n", "a, b\n", "1,2\n3,4\n5,6\n"]
)
def test_prose_and_code_are_no_tables(tmp_path, caplog, text):
    (tmp_path / "x.txt").write_text(text)
    list(read_documents(SourceConfig(type="files", path=str(tmp_path / "x.txt")), FIELD))
    assert "looks like" not in caplog.text


def test_a_column_of_plain_text_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("plain words\n")
    given = SourceConfig(type="files", path=str(tmp_path / "x.txt"), text_field="body")
    with pytest.raises(UserError, match=r"text_field=body applies to no file: .*x\.txt is plain text"):
        list(read_documents(given, FIELD))
    (tmp_path / "y.jsonl").write_text('{"body": "in a column"}\n')
    mixed = SourceConfig(type="files", path=str(tmp_path / "*.*"), text_field="body")
    assert list(read_documents(mixed, FIELD)) == ["plain words\n", "in a column"]


def test_packed_files_and_parquet_are_known_by_their_first_bytes(tmp_path):
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["two"]}), tmp_path / "shard-0")
    paths = [str(tmp_path / "packed.jsonl"), str(tmp_path / "shard-0")]
    assert list(read_documents(SourceConfig(type="files", path=paths), FIELD)) == ["one", "two"]


def test_an_optional_column_that_no_row_has_is_named(tmp_path):
    rows = [{"q": "hi", "a": "yes"}, {"q": "hi", "a": "no", "w": 0}]
    names = {"prompt": "q", "completion": "a"}
    assert said(source(tmp_path, rows, names | {"weight": "w"})) == [ASKED]
    with pytest.raises(UserError, match=r"data\.sources\.0\.columns\.weight names the column 'wieght', which no row"):
        said(source(tmp_path, rows, names | {"weight": "wieght"}))


def test_a_column_for_two_things_is_refused():
    with pytest.raises(ValueError, match="names a column for two things"):
        SourceConfig(type="files", path="x.jsonl", content="chat", columns={"prompt": "q", "completion": "q"})
    SourceConfig(type="files", path="x.jsonl", content="chat", columns={"messages": "content", "content": "content"})

"""Rows and files as people have them: recognised by shape and content, honoured or refused, never misread in silence."""

import bz2
import gzip
import json
import logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe_llm.config import SourceConfig
from moe_llm.data.chat import read_examples
from moe_llm.data.chat_template import ChatEncoder, turn_end_id
from moe_llm.data.sources import read_documents
from moe_llm.errors import UserError

FIELD = "data.sources.0"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% if m.tool_calls %}[CALL]{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as DeepSeek-R1's: the reasoning of all but the last turn is dropped
DROPS_REASONING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% else %}{% set c = m.content %}{% if not loop.last and '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
    "{% endif %}[A]{{ c }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)


def chat(tmp_path, rows, name: str = "rows.jsonl") -> SourceConfig:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceConfig(type="files", path=str(tmp_path / name), content="chat")


def with_template(tokenizer, template: str):
    from copy import deepcopy

    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def learned_texts(tokenizer, source: SourceConfig, **options) -> list[str]:
    """What is learned of each example, a text for each span."""
    encoder = ChatEncoder(tokenizer, FIELD, **options)
    found = []
    for ids, targets in encoder.encode(list(read_examples(source, FIELD))):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], targets, [0]]))).reshape(-1, 2)
        found.append("|".join(tokenizer.decode(ids[a:b].tolist()).strip() for a, b in edges))
    return found


def turns(*contents, **last):
    made = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    made[-1] |= last
    return made


SHAPES = {
    "messages": {"messages": turns("hi", "yes")},
    "ShareGPT": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    "Alpaca": {"instruction": "hi", "input": "", "output": "yes"},
    "prompt and completion": {"prompt": "hi", "completion": "yes"},
    "TRL's lists": {"prompt": turns("hi"), "completion": [{"role": "assistant", "content": "yes"}]},
    "preferences": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "preferences as messages": {"chosen": turns("hi", "yes"), "rejected": turns("hi", "no")},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *turns("hi", "yes")[1:]]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_every_shape_is_the_same_conversation(tmp_path, shape):
    [found] = read_examples(chat(tmp_path, [SHAPES[shape]]), FIELD)
    assert found.messages == turns("hi", "yes")


def test_an_instruction_with_input_holds_both(tmp_path):
    [found] = read_examples(chat(tmp_path, [{"instruction": "Add", "input": "1 2", "output": "3"}]), FIELD)
    assert found.messages[0]["content"] == "Add\n\n1 2"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_what_is_not_to_be_learned_is_masked(tokenizer, tmp_path, mark):
    tokenizer = with_template(tokenizer, CHATML)
    messages = turns("a", "one", "b", "two", "c", "three")
    messages[3] |= mark
    source = chat(tmp_path, [{"messages": messages}, {"messages": turns("a", "gone"), **mark}])
    assert learned_texts(tokenizer, source) == ["one<|im_end|>|three<|im_end|>"]
    marked = CHATML.replace("{{ m.content }}<|im_end|>", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
                            "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}")  # fmt: skip
    assert learned_texts(with_template(tokenizer, marked), source) == ["one<|im_end|>|three<|im_end|>"]


def test_only_the_last_turn_is_learned_where_asked_for(tokenizer, tmp_path):
    source = chat(tmp_path, [{"messages": turns("a", "one", "b", "two")}])
    assert learned_texts(with_template(tokenizer, CHATML), source, train_on="last") == ["two<|im_end|>"]


@pytest.mark.parametrize("weight", [0.5, -1, "0", True])
def test_other_weights_are_refused(tmp_path, weight):
    with pytest.raises(UserError, match=r"has the weight .*: use 1 to learn it and 0 not to"):
        list(read_examples(chat(tmp_path, [{"messages": turns("a", "b", weight=weight)}]), FIELD))


CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_tools_calls_and_reasoning_reach_the_template_and_are_learned(tokenizer, tmp_path, caplog):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": CALL, "reasoning_content": "hm"},
        {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"},
        {"role": "assistant", "content": "two"},
    ]
    source = chat(tmp_path, [{"messages": messages, "tools": TOOLS}])
    tokenizer = with_template(tokenizer, WITH_TOOLS)
    [learned] = learned_texts(tokenizer, source)
    assert "<think>hm</think>" in learned
    assert '[CALL][{"type": "function"' in learned
    assert learned.endswith("two<|im_end|>")
    [found] = read_examples(source, FIELD)
    encoder = ChatEncoder(tokenizer, FIELD)
    expected = tokenizer.apply_chat_template(found.messages, tools=TOOLS, tokenize=True, return_dict=False)
    assert encoder.encode([found])[0][0].tolist() == expected
    ignored = {record.getMessage().split("rows have ")[1].split(",")[0] for record in caplog.records}
    assert ignored == {"name", "tool_call_id"}


def test_a_template_that_ignores_tools_is_told_of(tokenizer, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    row = {"messages": turns("a", "b", tool_calls=CALL, reasoning_content="r"), "tools": TOOLS}
    learned_texts(with_template(tokenizer, CHATML), chat(tmp_path, [row, row]))
    assert sorted(m.getMessage().split("rows have ")[1].split(",")[0] for m in caplog.records) == [
        "reasoning_content", "tool_calls", "tools",
    ]  # fmt: skip


def test_a_template_that_rewrites_earlier_turns_is_taken(tokenizer, tmp_path):
    source = chat(tmp_path, [{"messages": turns("a", "<think>x</think>one", "b", "<think>y</think>two")}])
    [learned] = learned_texts(with_template(tokenizer, DROPS_REASONING), source)
    assert learned == "one<|im_end|>|<think>y</think>two<|im_end|>"


def test_the_end_of_a_turn_is_found(tokenizer):
    made = with_template(tokenizer, CHATML)
    assert made.convert_ids_to_tokens(turn_end_id(made)) == "<|im_end|>"
    assert turn_end_id(with_template(tokenizer, CHATML.replace("<|im_end|>", "[end]"))) is None


ROWS = [{"text": "one\ntwo"}, {"text": 'say "hi", you'}]


def write(path, kind: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = b'text,other\n"one\ntwo",1\n"say ""hi"", you",2\n'
    content = {
        "jsonl": lines, "array": json.dumps(ROWS).encode(), "indented": json.dumps(ROWS, indent=1).encode(),
        "csv": table, "tsv": table.replace(b",1", b"\t1").replace(b",2", b"\t2").replace(b"text,", b"text\t"),
    }[kind]  # fmt: skip
    name = path.name.lower()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".bz2"):
        content = bz2.compress(content)
    elif name.endswith(".zst"):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        content = sink.getvalue().to_pybytes()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.jsonl", "jsonl"), ("x.JSONL", "jsonl"), ("x.ndjson", "jsonl"), ("lines.json", "jsonl"), ("x.json", "array"),
        ("x.json", "indented"), ("x.JSON.gz", "array"), ("lines.json.gz", "jsonl"), ("x.jsonl.zst", "jsonl"),
        ("x.jsonl.bz2", "jsonl"), ("x.csv", "csv"), ("x.CSV", "csv"), ("x.csv.gz", "csv"), ("x.tsv", "tsv"),
    ],
)  # fmt: skip
def test_a_file_is_what_its_content_is(tmp_path, name, kind):
    write(tmp_path / name, kind)
    source = SourceConfig(type="files", path=str(tmp_path / name), text_field="text")
    assert list(read_documents(source, FIELD)) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("kind", ["jsonl", "array"])
def test_rows_under_a_name_of_text_are_told_of_or_refused(tmp_path, caplog, kind):
    write(tmp_path / "x.txt", kind)
    with pytest.raises(UserError, match=r"text_field=text applies to no text.*looks like"):
        list(read_documents(SourceConfig(type="files", path=str(tmp_path / "x.txt"), text_field="text"), FIELD))
    caplog.set_level(logging.WARNING)
    assert len(list(read_documents(SourceConfig(type="files", path=str(tmp_path / "x.txt")), FIELD))) == 1
    assert "looks like" in caplog.text


BAD = {
    "digits": ('{"text": "a", "n": ' + "9" * 5000 + "}", "holds a number that cannot be read"),
    "nesting": ('{"text": "a", "n": ' + "[" * 200_000 + "]" * 200_000 + "}", "is nested too deeply"),
}


@pytest.mark.parametrize("kind", BAD)
def test_json_that_python_cannot_read_is_named_by_file_and_line(tmp_path, kind):
    line, words = BAD[kind]
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2 {words}"):
        list(read_documents(SourceConfig(type="files", path=str(tmp_path / "x.jsonl")), FIELD))


def test_a_column_of_nulls_is_named(tmp_path):
    table = pyarrow.table({"messages": pyarrow.array([None, None], pyarrow.list_(pyarrow.string())), "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    source = SourceConfig(type="files", path=str(tmp_path / "x.parquet"), content="chat")
    with pytest.raises(UserError, match=r"has neither messages nor prompt and completion, but (other|nothing)"):
        list(read_examples(source, FIELD))


@pytest.mark.parametrize(("template", "stops"), [(CHATML, True), (CHATML.replace("<|im_end|>", "[end]"), False)])
def test_a_run_says_at_its_start_that_no_learned_turn_ends(tokenizer, tmp_path, caplog, template, stops):
    from moe_llm.config.load import validate
    from moe_llm.data.loader import load_data

    source = chat(tmp_path, [{"messages": turns(f"a {i}", f"one {i}")} for i in range(20)])
    raw = {
        "data": {"sources": [source.model_dump()], "cache_dir": str(tmp_path / "c"), "validation_fraction": 0.2},
        "train": {"max_steps": 1},
        "model": {"vocab_size": None},
        "tokenizer": {"path": "given"},
    }
    load_data(validate(raw), with_template(tokenizer, template), show_progress=False)
    assert ("will not learn to stop" in caplog.text) != stops


LISTED = turns("a", "one", "b")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": LISTED, "completion": [{"role": "assistant", "content": "two"}]}, "two<|im_end|>"),
        ({"prompt": LISTED, "completion": "two", "system": "be kind"}, "two<|im_end|>"),
        ({"prompt": LISTED, "chosen": "two", "rejected": "no"}, "two<|im_end|>"),
        ({"chosen": turns("a", "one", "b", "two"), "rejected": turns("a", "one", "b", "no")}, "two<|im_end|>"),
        ({"chosen": turns("a", "one", "b", "two")}, "two<|im_end|>"),
        ({"messages": turns("a", "one", "b", "two")}, "one<|im_end|>|two<|im_end|>"),
    ],
)
def test_answers_within_a_prompt_are_read_and_not_learned(tokenizer, tmp_path, row, expected):
    """As TRL learns rows of prompt and completion."""
    assert learned_texts(with_template(tokenizer, CHATML), chat(tmp_path, [row])) == [expected]


def test_a_completion_without_an_answer_is_named(tmp_path):
    row = {"prompt": LISTED, "completion": [{"role": "user", "content": "more"}]}
    with pytest.raises(UserError, match="line 1 has no turn of the assistant behind its prompt"):
        list(read_examples(chat(tmp_path, [row]), FIELD))


@pytest.mark.parametrize("mark", [{"loss": False}, {"train": None, "training": False}, {"weight": 0.0}])
def test_other_names_of_marks_are_honoured(tokenizer, tmp_path, mark):
    messages = turns("a", "", "b", "two")  # what is not learned may be empty
    messages[1] |= mark
    assert learned_texts(with_template(tokenizer, CHATML), chat(tmp_path, [{"messages": messages}])) == [
        "two<|im_end|>"
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": turns("a", "b", loss=0.5)}, r"turn 2 has loss=0\.5: use true"),
        ({"messages": turns("a", "b", training_detail=[])}, "turn 2 has training_detail.*mark whole turns with train"),
        ({"messages": turns("a", None, function_call={"name": "f"})}, "has function_call.*give its call as tool_calls"),
        (
            {"messages": turns("a", "b", tool_calls=["f"])},
            r"turn 2 has the tool_calls \[\"f\"\]: give it a list of objects",
        ),
        ({"messages": turns("a", "b", tool_calls="f")}, r"turn 2: tool_calls is \"f\", which is no JSON"),
        ({"messages": turns("a", "b"), "functions": [{"name": "f"}]}, "line 1 has functions.*give them as tools"),
        ({"messages": turns("a", "b"), "images": ["a.png"]}, "line 1 has images, and text alone"),
        ({"messages": turns("a", "b"), "chat_template_kwargs": ["x"]}, "chat_template_kwargs is .*give it an object"),
        ({"messages": turns("a", "b"), "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs sets tools"),
        ({"messages": turns("a", "b"), "documents": 1}, "documents is 1: give it a list of documents"),
        ({"messages": turns("a", "b", reasoning_content="\ud800")}, "turn 2 holds half of a surrogate pair"),
        ({"messages": turns("a", "b"), "tools": [{"name": "\ud800"}]}, "line 1 holds half of a surrogate pair"),
    ],
)
def test_what_cannot_be_learned_as_it_is_meant_is_refused_by_name(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        list(read_examples(chat(tmp_path, [row]), FIELD))


def test_the_template_gets_all_that_apply_chat_template_gets(tokenizer, tmp_path, caplog):
    """Fields of turns that no other template knows, the row's own arguments and documents."""
    template = (
        "{% if enable_thinking is defined and not enable_thinking %}[calm]{% endif %}{% for d in documents or [] %}"
        "{{ d.text }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.channel or 'main' }}{{ m.content }}<|im_end|>"
        "{% endfor %}"
    )
    messages = turns("a", "b", channel="side")
    row = {"chat_template_kwargs": {"enable_thinking": False, "unread": 1}, "documents": [{"text": "page"}]}
    tokenizer = with_template(tokenizer, template)
    [found] = read_examples(chat(tmp_path, [{"messages": messages, **row}]), FIELD)
    expected = tokenizer.apply_chat_template(
        messages, documents=row["documents"], return_dict=False, **row["chat_template_kwargs"]
    )
    assert ChatEncoder(tokenizer, FIELD).encode([found])[0][0].tolist() == expected
    assert "[calm]page" in tokenizer.decode(expected)
    assert [r.getMessage().split("rows have ")[1].split(",")[0] for r in caplog.records] == ["unread"]


def test_half_a_character_in_a_field_that_the_template_alone_writes_is_refused(tokenizer, tmp_path):
    [found] = read_examples(chat(tmp_path, [{"messages": turns("a", "b", channel="\udc00")}]), FIELD)
    tokenizer = with_template(tokenizer, CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m.channel }}"))
    with pytest.raises(UserError, match="line 1: the chat template writes half of a surrogate pair"):
        ChatEncoder(tokenizer, FIELD).encode([found])


def test_a_source_of_which_no_row_is_learned_says_so(tokenizer, tmp_path):
    from moe_llm.data.shards import cached_tokens
    from moe_llm.data.split import HoldOut

    source = chat(tmp_path, [{"messages": turns("a", "b"), "weight": 0}])
    with pytest.raises(UserError, match="holds no row that is learned"):
        cached_tokens(source, FIELD, HoldOut(), with_template(tokenizer, CHATML), cache_dir=str(tmp_path / "c"))


TWO_MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_MARK = TWO_MARKS.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")


@pytest.mark.parametrize(
    ("template", "options"), [(TWO_MARKS, {}), (TWO_MARKS, {"train_on": "last"}), (LAST_MARK, {"train_on": "last"})]
)
def test_marks_that_are_not_one_for_each_turn_are_those_within_learned_turns(tokenizer, tmp_path, template, options):
    messages = turns("a", "one", "b", "two")
    messages[1] |= {} if options else {"weight": 0}
    source = chat(tmp_path, [{"messages": messages}])
    assert learned_texts(with_template(tokenizer, template), source, **options) == ["two<|im_end|>"]


def test_llama_factorys_calls_are_calls(tmp_path):
    talk = [
        ("human", "1+1?"),
        ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        ("observation", "2"),
        ("gpt", "two"),
    ]
    row = {"conversations": [{"from": name, "value": text} for name, text in talk], "tools": json.dumps(TOOLS)}
    [found] = read_examples(chat(tmp_path, [row]), FIELD)
    assert [turn["role"] for turn in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"] == CALL
    assert found.tools == TOOLS
    row["conversations"][1]["value"] = "add 1"
    with pytest.raises(UserError, match='turn 2 has the role "function_call"'):
        list(read_examples(chat(tmp_path, [row]), FIELD))


def test_a_template_files_byte_order_mark_is_none_of_its_text(tmp_path):
    from moe_llm.config.load import validate
    from moe_llm.data.chat_template import template_setting

    (tmp_path / "x.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    raw = {
        "data": {
            "sources": [{"type": "files", "path": "x", "content": "chat"}],
            "chat_template": str(tmp_path / "x.jinja"),
        },
        "tokenizer": {"path": "x"},
        "train": {"max_steps": 1},
    }
    assert template_setting(validate(raw)) == CHATML

"""Rows that a teacher answers: of every shape, with tools and what else templates get, and without their last answer."""

import json
from copy import deepcopy

import pytest

from moe_llm.config import SourceConfig
from moe_llm.data.chat import to_question
from moe_llm.distill.answers import AnswerOptions, _read_prompts
from moe_llm.errors import UserError

ASKED = [{"role": "user", "content": "hi"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "yes"}]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if calm %}[calm]{% endif %}{% for m in messages %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "answer", "single"),
    [
        ({"prompt": "hi"}, "", True),
        ({"prompt": "hi", "completion": "yes"}, "yes", True),
        ({"prompt": ASKED}, "", False),
        ({"messages": ASKED}, "", False),
        ({"messages": ANSWERED}, "yes", False),
        ({"messages": [*ASKED, {"role": "assistant", "content": ""}]}, "", False),
        ({"messages": [*ASKED, ANSWERED[1] | {"weight": 0}], "weight": 0}, "yes", False),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "", False),
        ({"instruction": "hi"}, "", False),
        ({"instruction": "hi", "input": "", "output": "yes"}, "yes", False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "", False),
    ],
    ids=str,
)
def test_a_question_of_every_shape_is_the_same(row, answer, single):
    question = to_question(row, "row 1", "--prompts")
    assert (question.example.messages, question.answer, question.single) == (ASKED, answer, single)


def test_a_row_without_a_question_is_none():
    assert to_question({"text": "hi"}, "row 1", "--prompts") is None


def test_tools_and_arguments_reach_the_template_and_the_row_that_is_written(tokenizer, tmp_path):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {"messages": ANSWERED, "tools": tools, "chat_template_kwargs": {"calm": True}}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    source = SourceConfig(type="files", path=str(tmp_path / "x.jsonl"))
    [prompt] = _read_prompts(source, tokenizer, AnswerOptions())
    expected = tokenizer.apply_chat_template(
        ASKED, tools=tools, add_generation_prompt=True, calm=True, return_dict=False
    )
    assert prompt.ids == expected
    assert "[calm]" in tokenizer.decode(expected)
    assert prompt.answered("no") == row | {"messages": [*ASKED, {"role": "assistant", "content": "no"}]}


def test_a_broken_row_is_named(tokenizer, tmp_path):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [{"role": "alien", "content": "a"}]}))
    source = SourceConfig(type="files", path=str(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match='line 1: turn 1 has the role "alien"'):
        list(_read_prompts(source, tokenizer, AnswerOptions()))

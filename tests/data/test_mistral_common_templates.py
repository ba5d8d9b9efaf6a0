"""Every chat template that mistral-common makes, and each of its tokenizers: our ids are mistral-common's and
`apply_chat_template`'s, and what is learned is each answer or call with its </s>."""

import json
from pathlib import Path

import pytest
from support.ci import dear

from moe_llm.data.chat import example
from moe_llm.data.chat_template import ChatEncoder
from moe_llm.data.tokenizer import load_tokenizer

common = pytest.importorskip("mistral_common")
FILES = [
    *sorted(Path(common.__file__).parent.glob("data/*.model.v*")),
    *sorted(
        Path(common.__file__).parent.glob("data/tekken*.json"), reverse=True
    ),  # dear, so that only the newest is in CI
]
IN_CI = [file for i, file in enumerate(FILES) if file.suffix != ".json" or FILES[i - 1].suffix != ".json"]
CALL = {"type": "function", "id": "abcd12345", "function": {"name": "lookup", "arguments": '{"word": "router"}'}}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Find", "parameters": {"type": "object"}}}


def said(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


PLAIN = said("Hello, who are you?", "I am a model.\n  Indented.", "naïve 漢字 😀?", "4, of course")
SYSTEM = [{"role": "system", "content": "Be brief."}, *said("a", "one", "b", "two")]
CALLED = [
    *said("What is a router?"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sends tokens", "tool_call_id": "abcd12345", "name": "lookup"},
    *said("", "It sends tokens.", "And an expert?", "It takes them.")[1:],
]  # fmt: skip


@pytest.fixture(scope="module", params=dear(FILES, *IN_CI), ids=[file.name for file in FILES])
def both(request, tmp_path_factory):
    """A folder with mistral-common's file alone, and mistral-common's own tokenizer."""
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    folder = tmp_path_factory.mktemp("of") / request.param.suffix.removeprefix(".")
    folder.mkdir()
    (folder / ("tekken.json" if request.param.suffix == ".json" else "tokenizer.model")).symlink_to(request.param)
    (folder / "chat_template.jinja").write_text(convert_tokenizer_to_chat_template(request.param))
    theirs = MistralTokenizer.from_file(str(request.param), mode=ValidationMode.finetuning)
    return load_tokenizer(folder), theirs


def theirs_of(tokenizer, messages: list[dict], tools: list[dict] | None) -> list[int]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    request = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
    return tokenizer.encode_chat_completion(request).tokens


def test_text_has_mistral_commons_ids(both):
    ours, theirs = both
    raw = theirs.instruct_tokenizer.tokenizer
    for text in ("hello world", "  two  spaces\n\tdef f(x):", "naïve 漢字 😀 12345", json.dumps(CALLED)):
        assert ours.encode(text, add_special_tokens=False) == raw.encode(text, bos=False, eos=False)
    assert (ours.bos_token_id, ours.eos_token_id) == (raw.bos_id, raw.eos_id)


@pytest.mark.parametrize("messages", [PLAIN, SYSTEM, CALLED], ids=["plain", "system", "tools"])
def test_conversations_have_mistral_commons_ids_and_their_answers_are_learned(both, messages):
    ours, theirs = both
    tools = [TOOL] if messages is CALLED else None
    if tools and "[TOOL_CALLS]" not in ours.get_vocab():
        pytest.skip("Mistral's first format has no tools")
    expected = ours.apply_chat_template(messages, tools=tools, return_dict=False)
    [(ids, targets)] = ChatEncoder(ours, "s").encode([example(messages, "row 1", tools)])
    assert ids.tolist() == expected == theirs_of(theirs, messages, tools)
    answers = [m for m in messages if m["role"] == "assistant"]
    if ours.name_or_path.endswith("v2"):  # its format writes no calls that have been answered
        answers = [m for m in answers if not m.get("tool_calls")]
    assert (ids[targets == 1] == ours.eos_token_id).sum() == len(answers)
    spans = ours.decode(ids[targets == 1].tolist()).split("</s>")
    for message, span in zip(answers, spans):
        if calls := message.get("tool_calls"):
            assert span.strip().startswith("[TOOL_CALLS]")
            assert calls[0]["function"]["name"] in span
        else:
            assert span.strip() == message["content"].strip()
    read = ours.decode(ids[targets == 0].tolist())
    assert all(m["content"] in read for m in messages if m["role"] in ("user", "system"))
    assert not any(m["content"] in read for m in answers if m["content"])

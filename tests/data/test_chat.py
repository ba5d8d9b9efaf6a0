"""Chat rows become the tokens that transformers' chat template gives, with the assistant's turns as targets."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moe_llm.config import SourceConfig
from moe_llm.data import chat_template
from moe_llm.data.chat import example, read_examples
from moe_llm.data.chat_template import MIXTRAL, ChatEncoder
from moe_llm.data.tokenizer import build_tokenizer
from moe_llm.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTENT = st.text(
    st.sampled_from("ab 1\n\t▁\ue000éß漢😀[/]<s>INST.,") | st.characters(codec="utf-8"), min_size=1, max_size=20
).filter(str.strip)
TALKS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3).flatmap(
    lambda turns: st.booleans().map(lambda system: talk(*sum(turns, ()), system="be brief" if system else None))
)


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def with_template(tokenizer, template: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def encode(tokenizer, messages) -> tuple[list[int], list[int]]:
    ids, targets = ChatEncoder(tokenizer, "s").encode([example(messages, "row 1")])[0]
    return ids.tolist(), targets.tolist()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TALKS)
def test_ids_and_mask_are_those_of_transformers(tokenizer, messages):
    marked = with_template(tokenizer, MIXTRAL)
    expected = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encode(marked, messages) == (expected["input_ids"], expected["assistant_masks"])
    # A template without marks gives the same, from how its text grows.
    bare = with_template(tokenizer, chat_template._MARK.sub("", MIXTRAL).replace("{%- endgeneration %}", ""))
    assert encode(bare, messages) == (expected["input_ids"], expected["assistant_masks"])


def shown(tokens: str) -> str:
    return re.sub("<0x(..)>", lambda match: chr(int(match[1], 16)), tokens.replace("▁", " "))


def test_a_table_by_hand(tokenizer):
    pieces = [
        ("<s> [INST] x1 [/INST]", 0), (" the router", 1), ("</s>", 1), (" [INST] (a, b): [/INST]", 0), (" to", 1),
        ("</s>", 1),
    ]  # fmt: skip
    ids, targets = encode(with_template(tokenizer, MIXTRAL), talk("x1", "the router", "(a, b):", "to"))
    assert tokenizer.decode(ids) == "".join(text for text, _ in pieces)
    runs, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or targets[i] != targets[start] or ids[i] == 2 or ids[i - 1] == 2:
            runs.append((tokenizer.convert_ids_to_tokens(ids[start:i]), targets[start]))
            start = i
    assert [(shown("".join(tokens)), target) for tokens, target in runs] == pieces


def test_the_end_of_a_turn_is_learned_and_what_follows_it_is_not(tokenizer):
    chatml = copy.deepcopy(tokenizer)
    chatml.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chatml.chat_template = CHATML
    ids, targets = encode(chatml, talk("to", "experts", "the", "tokens", system="def"))
    learned = "".join(chatml.decode([i]) if t else "·" for i, t in zip(ids, targets))
    assert [part for part in learned.split("·") if part] == ["experts<|im_end|>", "tokens<|im_end|>"]


def test_a_token_on_the_border_is_a_target():
    """Merged from both sides: whoever generates the answer would have to generate it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "a": 1, ":": 2, "b": 3, ":b": 4}
    backend = Tokenizer(models.BPE(vocabulary, merges=[(":", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% else %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert encode(tokenizer, talk("a", "b")) == ([1, 4, 0], [0, 1, 1])


def test_mixtrals_format_is_that_of_its_reference(make_config, tmp_path):
    common = pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    path = tmp_path / "mixtral.model"
    path.write_bytes((Path(common.__file__).parent / "data" / "tokenizer.model.v1").read_bytes())
    chat = {"type": "files", "path": "chat.jsonl", "content": "chat"}
    tokenizer = build_tokenizer(
        make_config([chat], model={"vocab_size": None}, tokenizer={"path": str(path)}), tmp_path / "t"
    )
    reference = MistralTokenizer.v1().instruct_tokenizer
    kinds = {"user": UserMessage, "assistant": AssistantMessage}
    for messages, system in (
        (talk("Hello, who are you?", "I am a model.\n  Indented.", " Twice 2 ", "4 — naïve 漢字 😀"), None),
        (talk("def f(x):\n    return x", "It returns `x`."), "Be brief."),
    ):
        turns = [kinds[m["role"]](content=m["content"]) for m in messages]
        request = InstructRequest(messages=turns, system_prompt=system)
        expected = reference.encode_instruct(request).tokens
        ids, targets = encode(tokenizer, ([{"role": "system", "content": system}] if system else []) + messages)
        assert ids == expected
        answers = [[*tokenizer.encode(m["content"], add_special_tokens=False), 2] for m in messages[1::2]]
        assert [i for i, t in zip(ids, targets) if t] == [i for answer in answers for i in answer]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ('{"messages": [}', "line 2 is not valid JSON"),
        ("[1]", "line 2 is no JSON object"),
        ({"text": "a"}, "line 2 has neither messages nor prompt and completion, but text: say which"),
        ({"messages": "hello"}, 'line 2: messages is "hello": give it a list of turns'),
        ({"messages": []}, "line 2: messages is []: give it"),
        ({"messages": [{"role": "user"}]}, "line 2: turn 1 is {\"role\": \"user\"}: give it role and content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 'line 2: turn 1 has the role "robot": use one of system'),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: turn 1 has the content null"),
        ({"messages": talk("a", " \n")}, "line 2: turn 2, the assistant's, is empty"),
        ({"messages": talk("a")}, "line 2 has no turn of the assistant"),
        ({"prompt": "a", "completion": ""}, "line 2: turn 2, the assistant's, is empty"),
        ({"messages": talk("a", "\ud800")}, "line 2: turn 2 holds half of a surrogate pair"),
        ({"messages": talk("a", "b")[::-1]}, "line 2: the chat template refuses it (after an optional system turn"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_by_file_and_line(tokenizer, tmp_path, rows, sentence):
    path = tmp_path / "chat.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    path.write_text(good + "\n" + (rows if isinstance(rows, str) else json.dumps(rows)) + "\n")
    source, encoder = SourceConfig(type="files", path=str(path), content="chat"), with_template(tokenizer, MIXTRAL)
    with pytest.raises(UserError) as error:
        ChatEncoder(encoder, "data.sources.0").encode(list(read_examples(source, "data.sources.0")))
    assert f"data.sources.0: {path}, {sentence}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for %}", "the chat template is no jinja template (line 1: "),
        ("{{ messages[7]['content'] }}", "row 1: the chat template refuses it ("),
        ("always the same", "row 1: the chat template leaves nothing of what the assistant says"),
        ("{{ messages|length }}{% for m in messages %}{{ m.content|length }}{% endfor %}",
         "row 1: the chat template writes turn 2 otherwise"),
        (None, "the tokenizer has no chat template"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_serve_is_refused(tokenizer, template, sentence):
    with pytest.raises(UserError) as error:
        encode(with_template(tokenizer, template), talk("a", "b", "c", "d"))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_turns_that_a_template_leaves_out_are_not_learned_and_reported_once(tokenizer, caplog):
    made = with_template(tokenizer, "{{ messages|length }} {{ messages[-1]['content'] }}")
    for tokens, targets in ChatEncoder(made, "s").encode([example(talk("a", "b", "c", "d"), "row 1")] * 2):
        assert tokenizer.decode(tokens[targets == 1].tolist()).strip() == "d"
    assert caplog.text.count("writes nothing of some turns of the assistant") == 1


def test_rows_of_every_kind_of_file_are_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt_id": "1", "prompt": "x", "messages": talk("a", "b", system="s")},
        {"prompt_id": "2", "prompt": "x", "messages": talk("c", "d")},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "hub").mkdir()
    for path in (tmp_path / "a.jsonl", tmp_path / "hub/train.jsonl"):
        path.write_text(text)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for source in (
        {"type": "files", "path": "a.jsonl"},
        {"type": "files", "path": "a.parquet"},
        {"type": "hub", "path": "hub"},
    ):
        source["path"] = str(tmp_path / source["path"])
        found = list(read_examples(SourceConfig(content="chat", **source), "s"))
        assert [f.messages for f in found] == [row["messages"] for row in rows]
        assert len({f.where for f in found}) == 2


def test_the_template_goes_with_the_tokenizer(make_config, tokenizer, tmp_path):
    own = with_template(tokenizer, CHATML)
    own.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "mine.jinja").write_text("{{ 'mine' }}")
    source = [{"type": "files", "path": "chat.jsonl", "content": "chat"}]

    def built(name: str, template: str, target: str):
        config = make_config(source, tokenizer={"path": str(tmp_path / name)})
        config = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": template})})
        build_tokenizer(config, tmp_path / target)
        return AutoTokenizer.from_pretrained(tmp_path / target).chat_template

    assert built("own", "auto", "1") == built("own", "tokenizer", "2") == CHATML
    assert built("bare", "auto", "3") == built("own", "mixtral", "4") == MIXTRAL
    assert built("own", str(tmp_path / "mine.jinja"), "5") == "{{ 'mine' }}"
    with pytest.raises(UserError, match=r"data\.chat_template=tokenizer, but the tokenizer has no chat template"):
        built("bare", "tokenizer", "6")
    assert not (tmp_path / "6").exists()
    with pytest.raises(UserError, match=r"data\.chat_template=nowhere\.jinja cannot be read \(No such file"):
        built("bare", "nowhere.jinja", "7")
    (tmp_path / "mine.jinja").write_text("{{ 'changed' }}")
    with pytest.raises(UserError, match="holds a tokenizer built with chat_template="):
        built("own", str(tmp_path / "mine.jinja"), "5")


def test_threads_may_share_an_encoder(tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    encoder = ChatEncoder(with_template(tokenizer, MIXTRAL), "s")
    batches = [[example(talk(f"{i} the {j}", f"to {j}"), "") for j in range(20)] for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encoder.encode, batches))
    for batch, encoded in zip(batches, found):
        for (ids, targets), (ids_alone, targets_alone) in zip(encoded, encoder.encode(batch)):
            assert np.array_equal(ids, ids_alone)
            assert np.array_equal(targets, targets_alone)

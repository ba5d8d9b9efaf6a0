"""Ids and masks of training are those of `apply_chat_template(return_assistant_tokens_mask=True)`, with the template's
{% generation %} marks and without them, and mistral-common's own ids for Mistral's formats."""

import contextlib
import importlib.util
import json
import re
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_llm.data.chat import example
from moe_llm.data.chat_template import MIXTRAL, ChatEncoder
from moe_llm.data.tokenizer import load_tokenizer
from moe_llm.errors import UserError

common = pytest.importorskip("mistral_common")

# Mistral's third format: tools stand before the last question, calls and results have tokens of their own.
MISTRAL_V3 = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.index0 == ns.last %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
        {{- '[INST] ' + (system + '\\n\\n' if system is defined and loop.index0 == ns.last else '') + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- elif m.tool_calls %}{% generation %}{{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {{- '{"name": ' + call.function.name | tojson + ', "arguments": ' + call.function.arguments + ', "id": "' }}
            {{- call.id + '"}' + (', ' if not loop.last else '') }}
        {%- endfor %}{{- ']' + eos_token }}{% endgeneration %}
    {%- else %}{% generation %}{{- ' ' + m.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_V7 = """\
{{- bos_token }}{%- for m in messages %}
    {%- if m.role == 'system' %}{{- '[SYSTEM_PROMPT] ' + m.content + '[/SYSTEM_PROMPT]' }}
    {%- elif m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
    {%- else %}{% generation %}{{- ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}
"""
# ChatML as Qwen writes it: tools in the system turn, calls in tags, reasoning of the last answer alone.
CHATML = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{% endif %}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'tool' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}
        {%- if m.reasoning_content and loop.last %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}
        {{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA_3 = """\
{{- bos_token }}{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{- m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
# DeepSeek-R1's drops the reasoning of every turn but the last.
DEEPSEEK_R1 = """\
{{- bos_token }}{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
    {%- elif m.role == 'system' %}{{- m.content }}
    {%- else %}{%- set said = m.content.split('</think>')[-1] if not loop.last else m.content %}
        {{- '<|Assistant|>' }}{% generation %}{{- said + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{% endif %}
"""
# As transformers' own tests of the mask have it.
TRANSFORMERS = """\
{% for message in messages %}{% if message.role != 'assistant' %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% else %}\
{{ '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def turns(*contents: str, system: str | None = None) -> list[dict]:
    made = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + made


CALL = {"type": "function", "id": "abcd12345", "function": {"name": "lookup", "arguments": '{"word": "router"}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Find a word",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
CALLED = [
    *turns("What is a router?"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '"sends tokens"', "tool_call_id": "abcd12345", "name": "lookup"},
    *turns("", "It sends tokens.")[1:],
]  # fmt: skip
PLAIN = turns("Hello, who are you?", "I am a model.\n  Indented.")
LONG = turns("Hello", "naïve 漢字 😀", "Twice 2?", "4, of course", "Thanks", "Any time.")
SYSTEM = turns("def f(x):", "It returns x.", "And then?", "Nothing.", system="Be brief.")
REASONED = turns("a", "<think>x</think>one", "b", "<think>y</think>two")
SEPARATE = [
    *PLAIN,
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "so", "reasoning_content": "hm"},
]
AGAIN = [*CALLED, *turns("And an expert?", "It takes them.")]

TABLE = {
    "mixtral": (MIXTRAL, "v1", [PLAIN, LONG, SYSTEM]),
    "mistral v3": (MISTRAL_V3, "v3", [PLAIN, LONG, SYSTEM, CALLED, AGAIN]),
    "mistral v7": (MISTRAL_V7, "v7", [PLAIN, LONG, SYSTEM]),
    "chatml": (CHATML, "bytes", [PLAIN, LONG, SYSTEM, CALLED, AGAIN, SEPARATE]),
    "llama 3": (LLAMA_3, "bytes", [PLAIN, LONG, SYSTEM]),
    "deepseek r1": (DEEPSEEK_R1, "bytes", [PLAIN, LONG, REASONED]),
    "transformers": (TRANSFORMERS, "bytes", [PLAIN, LONG, SYSTEM]),
}
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|User|>",
    "<|Assistant|>",
]


def mistrals(version: str, directory: Path) -> PreTrainedTokenizerFast:
    [file] = Path(common.__file__).parent.glob(f"data/*.model.{version}")
    directory.mkdir()
    shutil.copy(file, directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Mistral's sentencepiece models, as folders with tokenizer.model alone, and a byte-level BPE."""
    root = tmp_path_factory.mktemp("folders")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return {version: mistrals(version, root / version) for version in ("v1", "v3", "v7")} | {"bytes": made}


def without_marks(template: str) -> str:
    return re.sub(
        r"\{%-?\s*(end)?generation\s*-?%\}", lambda mark: "{%- if 1 %}{% endif %}" if "%-" in mark[0] else "", template
    )


def tools_of(messages: list[dict]) -> list[dict] | None:
    return [TOOL] if any(message.get("tool_calls") for message in messages) else None


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", TABLE)
def test_ids_and_masks_are_those_of_the_template(tokenizers, name, marked):
    template, kind, conversations = TABLE[name]
    reference, tokenizer = deepcopy(tokenizers[kind]), deepcopy(tokenizers[kind])
    reference.chat_template = template
    tokenizer.chat_template = template if marked else without_marks(template)
    encoder = ChatEncoder(tokenizer, "data.sources.0")
    for messages in conversations:
        tools = tools_of(messages)
        expected = reference.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
        )
        [(ids, targets)] = encoder.encode([example(messages, "row 1", tools)])
        assert ids.tolist() == expected["input_ids"], messages
        assert targets.tolist() == expected["assistant_masks"], messages
        assert targets.any()
        assert not targets.all()


def files_of(package: str, folder: str) -> list[Path]:
    """Templates that a package has, without importing it."""
    found = importlib.util.find_spec(package)
    return [] if found is None or found.origin is None else sorted((Path(found.origin).parent / folder).glob("*.jinja"))


SHIPPED = [*files_of("trl", "chat_templates"), *files_of("mergekit", "_data/chat_templates")]
USUAL = re.compile(
    r"(mistral|chatml|llama3|qwen2_5|qwen3|qwen3_5_think|deepseekv3|glm4moe|gptoss|phi3_5)(_training)?\.jinja"
)
SHAPES = [PLAIN, SYSTEM, CALLED, AGAIN, SEPARATE, REASONED]


def byte_level(template: str, special: list[str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end_of_text|>")
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = template
    return made


def with_objects(messages: list[dict]) -> list[dict]:
    changed = deepcopy(messages)
    for call in (call for message in changed for call in message.get("tool_calls", [])):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return changed


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[] if USUAL.fullmatch(f.name) else pytest.mark.grid, id=f.stem) for f in SHIPPED],
)
def test_templates_that_trl_and_mergekit_ship_are_read_as_transformers_reads_them(file):
    """With tools, reasoning and system turns; what the template refuses as the rows have it gets calls' arguments as
    objects, and what it refuses then too is refused here, by its row."""
    template = file.read_text(encoding="utf-8")
    tokenizer = byte_level(template, sorted(set(re.findall(r"<\|\w+\|>|<｜[^｜>\s]+｜>|<\w+_of_turn>", template))))
    marked, agreed = without_marks(template) != template, 0
    for messages in SHAPES:
        tools, expected = tools_of(messages), None
        for form in (messages, with_objects(messages)):
            with contextlib.suppress(TemplateError, TypeError, ValueError):
                expected = tokenizer.apply_chat_template(
                    form, tools=tools, return_dict=True, return_assistant_tokens_mask=marked, add_special_tokens=False
                )
                break
        try:
            [(ids, targets)] = ChatEncoder(tokenizer, "s").encode([example(messages, "row 1", tools)])
        except UserError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert "row 1: the chat template" in refusal
            # without marks, a template that leaves out calls and results has turns that cannot be told apart
            assert expected is None or (messages in (CALLED, AGAIN) and not marked), refusal
            continue
        assert expected is not None, "transformers refuses it"
        assert ids.tolist() == expected["input_ids"]
        assert not marked or targets.tolist() == expected["assistant_masks"]
        assert targets.any()
        assert marked or "<|user|>" not in tokenizer.decode(ids[targets == 1])
        agreed += 1
    assert agreed >= 3 or "image" in template


# As transformers' tests have them, by what is learned of PLAIN behind a system turn, made by hand.
TESTED = {
    "role and content": (
        "{% for message in messages %}{{message['role'] + message['content']}}{% endfor %}",
        "assistantI am a model.\n  Indented.",
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "I am a model.\n  Indented.<|im_end|>",
    ),
    "the day": (
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
        "I am a model.\n  Indented.<|im_end|>",
    ),
    "only the last turn": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{% endfor %}",
        "I am a model.\n  Indented.<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", TESTED)
def test_templates_of_transformers_tests_are_learned_as_the_table_says(tokenizers, name):
    template, learned = TESTED[name]
    tokenizer = deepcopy(tokenizers["bytes"])
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": "Be brief."}, *PLAIN]
    [(ids, targets)] = ChatEncoder(tokenizer, "s").encode([example(messages, "row 1")])
    assert ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(ids[targets == 1]) == learned


@pytest.mark.parametrize(("given", "written"), [("objects", "as JSON"), ("JSON", "as objects")])
def test_arguments_of_calls_are_given_as_the_template_takes_them(tokenizers, caplog, given, written):
    takes = {
        "as JSON": "{{ '<|im_start|>' + c.function.arguments + '<|im_end|>' }}",
        "as objects": "{{ '<|im_start|>' }}{% for k, v in c.function.arguments.items() %}{{ k + '=' + v }}{% endfor %}",
    }[written]
    tokenizer = deepcopy(tokenizers["bytes"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{% generation %}{% for c in m.tool_calls %}"
        + takes
        + "{% endfor %}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = with_objects(CALLED[:2]) if given == "objects" else CALLED[:2]
    [(ids, targets)] = ChatEncoder(tokenizer, "s").encode([example(messages, "row 1", [TOOL])])
    said = {"as JSON": '<|im_start|>{"word": "router"}<|im_end|>', "as objects": "<|im_start|>word=router"}[written]
    assert tokenizer.decode(ids[targets == 1]) == said
    assert "it gets them" in caplog.text


def test_arguments_that_a_template_quotes_once_more_are_reported(tokenizers, caplog):
    tokenizer = deepcopy(tokenizers["bytes"])
    tokenizer.chat_template = CHATML
    encoder = ChatEncoder(tokenizer, "s")
    encoder.encode([example(with_objects(CALLED), "row 1", [TOOL])])
    assert "quote" not in caplog.text
    encoder.encode([example(CALLED, "row 2", [TOOL])] * 2)
    assert caplog.text.count("the model learns to quote them") == 1


def test_a_span_ends_at_no_half_of_a_special_token(tokenizers):
    """Phi-3's template ends the last turn with eos, of which other special tokens share the first characters."""
    tokenizer = deepcopy(tokenizers["bytes"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% else %}{{ eos_token }}{% endif %}"
    )
    [(ids, targets)] = ChatEncoder(tokenizer, "s").encode([example(turns("a", "b", "c", "d"), "row 1")])
    assert tokenizer.decode(ids[targets == 1]) == "b<|im_end|>d<|im_end|><|end|>"


def test_a_table_by_hand(tokenizers):
    """What is learned of each conversation, a text for each span, without marks."""
    expected = {
        "mistral v3": ['[TOOL_CALLS] [{"name": "lookup", "arguments": {"word": "router"}, "id": "abcd12345"}]</s>',
                       "It sends tokens.</s>", "It takes them.</s>"],
        "chatml": ['\n<tool_call>\n{"name": "lookup", "arguments": "{\\"word\\": \\"router\\"}"}\n</tool_call><|im_end|>',
                   "It sends tokens.<|im_end|>", "It takes them.<|im_end|>"],
    }  # fmt: skip
    for name, texts in expected.items():
        template, kind, _ = TABLE[name]
        tokenizer = deepcopy(tokenizers[kind])
        tokenizer.chat_template = without_marks(template)
        [(ids, targets)] = ChatEncoder(tokenizer, "s").encode([example(AGAIN, "row 1", [TOOL])])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], targets, [0]]))).reshape(-1, 2)
        assert [tokenizer.decode(ids[a:b].tolist()).removeprefix(" ") for a, b in edges] == texts


@pytest.mark.parametrize("name", ["mixtral", "mistral v3", "mistral v7"])
def test_ids_are_mistral_commons(tokenizers, name):
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    template, kind, conversations = TABLE[name]
    [file] = Path(common.__file__).parent.glob(f"data/*.model.{kind}")
    theirs = MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning)
    tokenizer = deepcopy(tokenizers[kind])
    tokenizer.chat_template = template
    roles = {"system": SystemMessage, "user": UserMessage}

    def as_theirs(message: dict):
        if message["role"] == "tool":
            return ToolMessage(**{k: message[k] for k in ("content", "tool_call_id", "name")})
        if message["role"] == "assistant":
            calls = [
                ToolCall(id=c["id"], function=FunctionCall(**c["function"])) for c in message.get("tool_calls") or []
            ]
            return AssistantMessage(content=message["content"] or None, tool_calls=calls or None)
        return roles[message["role"]](content=message["content"])

    for messages in conversations:
        tools = tools_of(messages)
        request = ChatCompletionRequest(
            messages=[as_theirs(message) for message in messages],
            tools=[Tool(function=Function(**tool["function"])) for tool in tools] if tools else None,
        )
        expected = theirs.encode_chat_completion(request).tokens
        [(ids, _)] = ChatEncoder(tokenizer, "s").encode([example(messages, "row 1", tools)])
        if tools:  # of calls and results alone: the schema's keys may be written in another order
            begin = [t.index(tokenizer.convert_tokens_to_ids("[/AVAILABLE_TOOLS]")) for t in (expected, ids.tolist())]
            assert ids.tolist()[begin[1] :] == expected[begin[0] :]
        else:
            assert ids.tolist() == expected


def test_a_turn_that_cannot_be_told_apart_is_refused_with_the_remedy(tokenizers):
    tokenizer = deepcopy(tokenizers["bytes"])
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content | length }}{% endfor %}"
    with pytest.raises(UserError, match=r"\{% generation %\}"):
        ChatEncoder(tokenizer, "s").encode([example(LONG, "row 1")])


@pytest.mark.parametrize("version", ["v1", "v3", "v7"])
def test_every_sentencepiece_model_has_its_own_ids(tokenizers, version):
    import sentencepiece

    [file] = Path(common.__file__).parent.glob(f"data/*.model.{version}")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for messages in (PLAIN, LONG, SYSTEM):
        text = json.dumps(messages, ensure_ascii=False, indent=1)
        assert tokenizers[version].encode(text, add_special_tokens=False) == processor.encode(text)

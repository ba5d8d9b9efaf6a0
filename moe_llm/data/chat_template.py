"""Chat templates: which one a run uses, and from messages to tokens and a mask of what the assistant says.

A conversation is rendered and tokenised as a whole, as `apply_chat_template` does, because pieces tokenised apart may
give other tokens. What the assistant says is known in characters, and a token is a target if any of its characters
is: from the template's own {% generation %} marks, or else from how the text grows when a turn is added.
"""

import copy
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moe_llm.config import Config
from moe_llm.data.chat import PASSED, Example, Message, example, half_of_a_pair
from moe_llm.data.documents import plain_backend, vocabulary_size
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_FILE = "chat_template.jinja"  # where transformers looks for it, beside the tokenizer
# Mixtral-Instruct's format; the reference is mistral-common's tokenizer of version 1.
MIXTRAL = """\
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn['role'] != ('user' if loop.index is odd else 'assistant') %}
        {{- raise_exception('after an optional system turn, user and assistant take turns, and the user begins') }}
    {%- elif turn['role'] == 'user' %}
        {{- ' [INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + turn['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
logger = logging.getLogger(__name__)

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_rendering = threading.Lock()  # transformers' tracker of {% generation %} serves one conversation at a time
Spans = list[tuple[int, int]]


def template_setting(config: Config) -> str | None:
    """`data.chat_template` by content: a word, or the text of the file; None where no source is chat.

    Raises:
        UserError: the file cannot be read.
    """
    name = config.data.chat_template
    if not config.data.has_chat:
        return None
    if name in ("auto", "tokenizer", "mixtral"):
        return name
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")  # a byte order mark is none of its text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template={name} cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8'}): "
            "give auto, tokenizer, mixtral or a file with a jinja template"
        ) from error


def write_template(config: Config, tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Put the run's template beside its saved tokenizer, from where it goes into every checkpoint.

    Raises:
        UserError: the tokenizer has no template where its own is asked for.
    """
    setting = template_setting(config)
    own = setting in ("auto", "tokenizer")
    if setting is None or (own and own_template(tokenizer) is not None):
        return
    if own and tokenizer.chat_template:
        raise UserError(
            f"data.chat_template={setting}, but none of the tokenizer's chat templates, {', '.join(tokenizer.chat_template)}, "
            "is called default: use mixtral, or give a file with one of them"
        )
    if setting == "tokenizer":
        raise UserError(
            "data.chat_template=tokenizer, but the tokenizer has no chat template: use mixtral, or give a file"
        )
    text = MIXTRAL if setting in ("auto", "mixtral") else setting
    (directory / TEMPLATE_FILE).write_text(text, encoding="utf-8")


def own_template(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """The tokenizer's chat template; of several the default one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


class ChatEncoder:
    """Examples to tokens and targets, by a tokenizer's chat template. Threads may share an encoder.

    Args:
        field: name of the source in the configuration, for errors.
        train_on: all: every turn of the assistant's; last: the last one of each example.

    Raises:
        UserError: the tokenizer has no chat template, or one that is no template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", field: str, train_on: str = "all"):
        self._last_only = train_on == "last"
        self._looked_at: set[str] = set()  # fields of which it is known whether the template writes them

        template = own_template(tokenizer)
        if template is None:
            raise UserError(f"{field} is chat, but the tokenizer has no chat template: save one with it")
        self.template, self._field = template, field
        self._names = dict(tokenizer.special_tokens_map)
        self._special = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._special_text = re.compile(
            "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)"
        )
        self._marked = _MARK.search(template) is not None
        self._backend = plain_backend(tokenizer, parse_special_tokens=True)
        self.dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)

    def encode(self, examples: list[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, targets) of each: (tokens,) ids and (tokens,) uint8, 1 where the assistant speaks, the end of its
        turn included; never at the first token, which nothing predicts.

        Raises:
            UserError: the template refuses an example, or leaves nothing of its assistant's turns.
        """
        with _rendering:
            rendered = [self.render(found) for found in examples]
        for found, (text, _) in zip(examples, rendered):
            if half_of_a_pair(text) is not None:  # in a field that this template alone writes
                raise self._refusal(
                    found, "writes half of a surrogate pair, which is no Unicode text", "repair that row"
                )
        encodings = self._backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            self._tokens(encoding, spans, found) for encoding, (_, spans), found in zip(encodings, rendered, examples)
        ]

    def _tokens(self, encoding, spans: Spans, found: Example) -> tuple[np.ndarray, np.ndarray]:
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        targets = np.zeros(len(begins), np.uint8)
        for begin, end in spans:
            inside = np.flatnonzero((begins < end) & (ends > begin))
            if len(inside):
                targets[inside[0] : inside[-1] + 1] = 1  # tokens of no width between them too
        targets[:1] = 0
        if not targets.any():
            raise self._refusal(found, "leaves nothing of what the assistant says", "use another template")
        return np.array(encoding.ids, self.dtype), targets

    def render(self, found: Example) -> tuple[str, Spans]:
        """The text of a conversation, and where the assistant speaks in it, in characters, as far as it is learned."""
        found = self._with_fitting_arguments(found)
        self._report_what_is_ignored(found)
        learned = found.learned(self._last_only)
        assistants = [turn for turn, m in enumerate(found.messages) if m["role"] == "assistant"]
        if self._marked:
            text, marked = self._call(found, found.messages, marks=True)
            if learned == assistants:
                return text, marked
            return text, self._marked_within(found, text, marked, learned, assistants)
        text, _ = self._call(found, found.messages)
        return text, [self._span(found, text, turn) for turn in learned]

    def _marked_within(
        self, found: Example, text: str, marked: Spans, learned: list[int], assistants: list[int]
    ) -> Spans:
        """Of what the template marks, that within the turns that are learned; a turn may have several marks or none."""
        try:
            spans = [self._span(found, text, turn) for turn in learned]
        except UserError:  # turns that cannot be told apart but by their marks, one for each
            if len(marked) != len(assistants):
                raise
            return [span for span, turn in zip(marked, assistants) if turn in learned]
        return [(a, b) for a, b in marked if any(max(a, c) < min(b, d) for c, d in spans)]

    def _with_fitting_arguments(self, found: Example) -> Example:
        """An example whose calls have their arguments as the template takes them: as they are, if it does; else as
        objects in place of their JSON, as Qwen3.5's and GLM's templates want them, or as JSON in place of objects."""
        if not any(message.get("tool_calls") for message in found.messages):
            return found
        refusal: UserError | None = None
        for change in (None, _as_objects, _as_json):
            changed = found if change is None else replace(found, messages=_with_arguments(found.messages, change))
            try:
                text, _ = self._call(changed, changed.messages)
            except UserError as error:
                refusal = refusal or error
            else:
                self._report_arguments(changed, text, None if change is None else change.__name__)
                return changed
        assert refusal is not None
        raise refusal

    def _report_arguments(self, found: Example, text: str, change: str | None) -> None:
        """Warn once where calls are not written as the rows have them, or are written as JSON within JSON."""
        how = change
        if change is None:
            given = [given for message in found.messages for given in _arguments(message) if isinstance(given, str)]
            how = "quoted" if any(len(a) > 2 and json.dumps(a, ensure_ascii=False) in text for a in given) else None
        if how is None or how in self._looked_at:
            return
        self._looked_at.add(how)
        sentence = {
            "_as_objects": "arguments of tool_calls are JSON texts, and the chat template takes objects: it gets them",
            "_as_json": "arguments of tool_calls are objects, and the chat template takes JSON texts: it gets them",
            "quoted": "arguments of tool_calls are JSON texts, which the chat template writes as quoted texts, so that "
            "the model learns to quote them: give them as objects if it shall not",
        }
        logger.warning("%s: %s", self._field, sentence[how])

    def _report_what_is_ignored(self, found: Example) -> None:
        """Warn once of each field that rows have and the template does not write."""
        fields = {name for message in found.messages for name in message if name in PASSED}
        fields |= ({"tools"} if found.tools else set()) | {*found.options}
        for name in sorted(fields - self._looked_at):
            self._looked_at.add(name)
            messages = [{key: value for key, value in m.items() if key != name} for m in found.messages]
            options = {key: value for key, value in found.options.items() if key != name}
            tools = None if name == "tools" else found.tools
            without = replace(found, messages=messages, tools=tools, options=options)
            try:
                ignored = self._call(found, found.messages) == self._call(without, messages)
            except (
                UserError
            ):  # without the field, the conversation is one that the template refuses: it reads the field
                ignored = False
            if ignored:
                logger.warning(
                    "%s: rows have %s, which the chat template does not write, so that it is not learned: use a template "
                    "that does (data.chat_template), or remove it", self._field, name,
                )  # fmt: skip

    def _span(self, found: Example, text: str, turn: int) -> tuple[int, int]:
        """What the text has from one turn of the assistant, by rendering the conversation up to it and with it."""
        before, _ = self._call(found, found.messages[:turn], prompt=True) if turn else ("", [])
        after, _ = self._call(found, found.messages[: turn + 1])
        if not (text.startswith(after) and after.startswith(before)):
            return self._span_of_content(found, text, turn)
        # Nothing is generated behind the token that ends a turn, such as ChatML's line break behind <|im_end|>.
        ended = after.rstrip()
        return len(before), len(ended if ended.endswith(self._special) else after)

    def _span_of_content(self, found: Example, text: str, turn: int) -> tuple[int, int]:
        """The same for templates that write a turn in another way when others follow it: DeepSeek-R1's drops the reasoning,
        Mistral's puts the tools before the last question. The turn is found by other words in its place; it begins behind
        what the template asks an answer with, and ends as it does where it is the last one."""
        place = self._place(found, text, found.messages, turn)
        if place is None and self._leaves_out(found, text, turn):
            return 0, 0
        if place is None:
            raise self._refusal(
                found,
                f"writes turn {turn + 1} otherwise when other turns follow it",
                "mark what the assistant says with {% generation %} in a template of your own",
            )
        begin, end = place
        asked = self._place(found, text, found.messages, turn - 1) if turn else None
        if asked is not None:
            before, _ = self._call(found, found.messages[:turn], prompt=True)
            place = self._place(found, before, found.messages[:turn], turn - 1, prompt=True)
            if place is not None:  # as much as is written of what asks for an answer, such as assistant and <think>
                asking = before[place[1] :]
                common = _common(asking, text[asked[1] :])
                begin = min(begin, asked[1] + common) if common or not asking else begin
        last, _ = self._call(found, found.messages[: turn + 1])
        place = self._place(found, last, found.messages[: turn + 1], turn)
        if place is not None:
            end += _common(last[place[1] :], text[end:])
        for special in self._special_text.finditer(text):  # no half of one
            begin, end = (special.start() if special.start() < edge < special.end() else edge for edge in (begin, end))
        ended = text[begin:end].rstrip()
        return begin, begin + len(ended) if ended.endswith(self._special) else end

    def _place(
        self, found: Example, text: str, messages: list[Message], turn: int, prompt: bool = False
    ) -> tuple[int, int] | None:
        """Where the words of a turn, or the name of its first call, stand in the text that a conversation is written as;
        None if they cannot be told."""
        turns = _with_other_words(messages, turn)
        if turns is None:
            return None
        other, _ = self._call(found, turns, prompt=prompt)
        before, found_mark, behind = other.partition(_OTHER_WORDS)
        if not found_mark or _OTHER_WORDS in behind or not (text.startswith(before) and text.endswith(behind)):
            return None
        return len(before), len(text) - len(behind)

    def _leaves_out(self, found: Example, text: str, turn: int) -> bool:
        """Whether the template writes nothing of a turn, as Mistral's second format does with calls that have been answered.
        A warning says so once."""
        turns = _with_other_words(found.messages, turn)
        if turns is None or self._call(found, turns)[0] != text:
            return False
        if "turns" not in self._looked_at:
            self._looked_at.add("turns")
            logger.warning(
                "%s: the chat template writes nothing of some turns of the assistant that others follow, so that they are "
                "not learned", self._field,
            )  # fmt: skip
        return True

    def _call(
        self, found: Example, messages: list[Message], *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, Spans]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[messages],
                tools=found.tools,
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **{**self._names, **found.options},
            )
        except TemplateSyntaxError as error:
            raise UserError(
                f"{self._field}: the chat template is no jinja template (line {error.lineno}: {error.message}): "
                "set data.chat_template to another"
            ) from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise self._refusal(found, f"refuses it ({reason})", "repair that row or set data.chat_template") from error
        return texts[0], spans[0] if marks else []

    def _refusal(self, found: Example, what: str, remedy: str) -> UserError:
        return UserError(f"{self._field}: {found.where}: the chat template {what}: {remedy}")


_OTHER_WORDS = "qXzq7Jvw"


def _with_other_words(messages: list[Message], turn: int) -> list[Message] | None:
    """A conversation with other words in place of what a turn says, or of the name of its first call; None if it has
    neither."""
    turns = copy.deepcopy(messages)
    if content := turns[turn]["content"]:
        thought, end, said = content.rpartition("</think>")  # which templates take out of the content
        turns[turn]["content"] = thought + end + _OTHER_WORDS if said.strip() else _OTHER_WORDS
        return turns
    calls = turns[turn].get("tool_calls")
    if not calls or not isinstance(calls[0], dict) or not isinstance(calls[0].get("function"), dict):
        return None
    calls[0]["function"]["name"] = _OTHER_WORDS
    return turns


def _common(one: str, other: str) -> int:
    """The length of what two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _arguments(message: Message) -> list[Any]:
    """Those of a turn's calls."""
    calls = message.get("tool_calls")
    functions = (
        [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    )
    return [function["arguments"] for function in functions if isinstance(function, dict) and "arguments" in function]


def _with_arguments(messages: list[Message], change: Callable[[Any], Any]) -> list[Message]:
    changed = copy.deepcopy(messages)
    for message in changed:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and "arguments" in function:
                function["arguments"] = change(function["arguments"])
    return changed


def _as_objects(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments  # no JSON: the template's own refusal says what it wants


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def render_prompt(
    tokenizer: Any,
    messages: list[Message],
    where: str,
    *,
    tools: list[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the text that the assistant is to go on from, by the tokenizer's chat template.

    Args:
        where: of whom errors speak. tools, options: as those of an `Example`.

    Raises:
        UserError: the template refuses it.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **(options or {})
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: the chat template refuses it ({reason}): change it, or the template") from error


def turn_end_id(tokenizer: Any) -> int | None:
    """The special token that ends the assistant's turn by the tokenizer's chat template, as it is learned; None where no
    special token does, or there is no template that renders a question and its answer."""
    if getattr(tokenizer, "chat_template", None) is None or getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    turns: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    try:
        [(ids, targets)] = ChatEncoder(tokenizer, "the tokenizer").encode([example(turns, "a greeting")])
    except UserError:  # a template for other conversations: the run's own data will tell
        return None
    last = int(ids[np.flatnonzero(targets)[-1]])
    added = tokenizer.added_tokens_decoder.get(last)
    return last if last in tokenizer.all_special_ids or (added is not None and added.special) else None

"""Chat templates: which one a run uses, and from messages to tokens and a mask of what the assistant says.

A conversation is rendered and tokenised as a whole, as `apply_chat_template` does, because pieces tokenised apart may
give other tokens. What the assistant says is known in characters, and a token is a target if any of its characters
is: from the template's own {% generation %} marks, or else from how the text grows when a turn is added.
"""

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_llm.config import Config
from moe_llm.data.chat import Example, Message
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
        return Path(name).expanduser().read_text(encoding="utf-8")
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
    if setting is None or (setting in ("auto", "tokenizer") and own_template(tokenizer) is not None):
        return
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

    Raises:
        UserError: the tokenizer has no chat template, or one that is no template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", field: str):
        from tokenizers import Tokenizer

        template = own_template(tokenizer)
        if template is None:
            raise UserError(f"{field} is chat, but the tokenizer has no chat template: save one with it")
        self.template, self._field = template, field
        self._names = dict(tokenizer.special_tokens_map)
        self._special = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._marked = _MARK.search(template) is not None
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)

    def encode(self, examples: list[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, targets) of each: (tokens,) ids and (tokens,) uint8, 1 where the assistant speaks, the end of its
        turn included; never at the first token, which nothing predicts.

        Raises:
            UserError: the template refuses an example, or leaves nothing of its assistant's turns.
        """
        with _rendering:
            rendered = [self.render(found) for found in examples]
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
        """The text of a conversation, and where the assistant speaks in it, in characters."""
        if self._marked:
            return self._call(found, found.messages, marks=True)
        text, _ = self._call(found, found.messages)
        spans = [self._span(found, text, turn) for turn, m in enumerate(found.messages) if m["role"] == "assistant"]
        return text, spans

    def _span(self, found: Example, text: str, turn: int) -> tuple[int, int]:
        """What the text has from one turn of the assistant, by rendering the conversation up to it and with it."""
        before, _ = self._call(found, found.messages[:turn], prompt=True) if turn else ("", [])
        after, _ = self._call(found, found.messages[: turn + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise self._refusal(
                found,
                f"writes turn {turn + 1} otherwise when other turns follow it",
                "mark what the assistant says with {% generation %} in a template of your own",
            )
        # Nothing is generated behind the token that ends a turn, such as ChatML's line break behind <|im_end|>.
        ended = after.rstrip()
        return len(before), len(ended if ended.endswith(self._special) else after)

    def _call(
        self, found: Example, messages: list[Message], *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, Spans]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self._names,
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

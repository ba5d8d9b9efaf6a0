"""Documents of text as tokens, and where the text of special tokens stands in them.

One rule holds for every command. A document that is trained on or scored begins with the start of text, bos, once, and ends
with the end of text, eos, once, whatever `add_eos_token` says; where the tokenizer has no bos, or `add_bos_token` is false,
it begins with eos, which separates it from the document before. A prompt begins with bos, once, if the tokenizer puts it
there: as `add_bos_token` says or, where that is not said, as tokenizer.json's post-processor does, which may put other tokens
there. It never ends with an eos that it does not spell out itself, since it is to be continued.
"""

import json
import logging
import re
from array import array
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_ELEMENT = re.compile(r"</?[a-z]+>")


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Rows that a model needs: the largest id plus one, which is more than `len(tokenizer)` where ids have holes."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def check_rows(ids: Iterable[int], tokenizer: Any, rows: int, what: str) -> None:
    """Refuse tokens that a model has no embedding for.

    Args:
        ids: of a text. rows: of the model's embedding. what: the text's name, for the error.

    Raises:
        UserError: it names the token.
    """
    last = max(ids, default=-1)
    if last >= rows:
        raise UserError(
            f"{what} holds the token {tokenizer.convert_ids_to_tokens(int(last))!r} with the id {last}, and the model has "
            f"{rows} rows of embeddings: use the tokenizer that it was trained with, or add rows by training it with "
            "model.resize_embeddings=true"
        )


class DocumentEncoder:
    """Text to the tokens of a document, bos + ids + eos, as numpy arrays. Threads may share an encoder.

    Args:
        parse_special_tokens: the text of a special token, such as "</s>", becomes that token, and bos and eos are not
            put where they are already; False: it is encoded as the text it is.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", parse_special_tokens: bool = False):
        self._backend = plain_backend(tokenizer, parse_special_tokens)
        self._parsed = parse_special_tokens
        self.eos = tokenizer.eos_token_id
        self.bos = self.eos if has_no_bos(tokenizer) else tokenizer.bos_token_id
        self.dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process; a backend forgets on its way there what it does with the text of special tokens."""
        vars(self).update(state)
        self._backend.encode_special_tokens = not self._parsed

    def utf8_length(self, text: str) -> int:
        """Bytes that a document's tokens stand for."""
        return len(text.encode("utf-8"))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._framed(array("I", encoding.ids)) for encoding in encodings]

    def encode_continuations(self, parts: list[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The tokens of each (prompt, answer), one behind the other, and uint8 targets: 1 for those with a character of the
        answer, and for eos."""
        encodings = self._backend.encode_batch([prompt + answer for prompt, answer in parts], add_special_tokens=False)
        encoded = []
        for (prompt, _), encoding in zip(parts, encodings):
            learned = [end > len(prompt) for _, end in encoding.offsets]
            ids = np.array([self.bos, *encoding.ids, self.eos], dtype=self.dtype)
            encoded.append((ids, np.array([False, *learned, True], np.uint8)))
        return encoded

    def _framed(self, ids: "array[int]") -> np.ndarray:
        """Between bos and eos. `array` takes a list in half the time that numpy does."""
        begin = int(self._parsed and len(ids) > 0 and ids[0] == self.bos)
        end = len(ids) - int(self._parsed and len(ids) > begin and ids[-1] == self.eos)
        framed = np.empty(end - begin + 2, self.dtype)
        framed[0], framed[-1] = self.bos, self.eos
        framed[1:-1] = np.asarray(ids)[begin:end]
        return framed


def plain_backend(tokenizer: "PreTrainedTokenizerFast", parse_special_tokens: bool) -> Any:
    """A copy of the backend that neither cuts nor pads."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = not parse_special_tokens
    backend.no_truncation()
    backend.no_padding()
    return backend


def begin_of(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The tokens that the tokenizer's post-processor puts before a text, most often bos or none
    (`obey_add_bos_token` has made it so)."""
    backend = tokenizer.backend_tokenizer
    whole, text = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    return next((whole[:at] for at in range(len(whole)) if text and whole[at : at + len(text)] == text), [])


def begins_with_bos(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether a prompt begins with bos."""
    return tokenizer.bos_token_id is not None and begin_of(tokenizer)[:1] == [tokenizer.bos_token_id]


def has_no_bos(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether nothing begins with bos: there is none, or `add_bos_token` is false."""
    return tokenizer.bos_token_id is None or getattr(tokenizer, "init_kwargs", {}).get("add_bos_token") is False


def obey_add_bos_token(tokenizer: "PreTrainedTokenizerFast", said: object) -> None:
    """Make the post-processor follow `add_bos_token` of tokenizer_config.json, which transformers ignores beside a
    tokenizer.json; a copy of the tokenizer then says the same in its tokenizer.json. A token that the post-processor puts
    before each text is bos, also where no file calls it so.

    Args:
        said: the key's value; other than true and false, it says nothing.
    """
    begin = begin_of(tokenizer)
    if said is not False and tokenizer.bos_token_id is None and len(begin) == 1:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(begin[0])
    bos = tokenizer.bos_token_id
    if isinstance(said, bool):
        tokenizer.init_kwargs["add_bos_token"] = said
    if not isinstance(said, bool) or said == bool(begin) or (said and bos is None):
        return
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    ends = tokenizer.eos_token_id is not None and backend.encode("a").ids[-1:] == [tokenizer.eos_token_id]
    first, end = [tokenizer.bos_token] * said, [tokenizer.eos_token] * ends
    known = ({tokenizer.bos_token: bos} if said else {}) | (
        {tokenizer.eos_token: tokenizer.eos_token_id} if ends else {}
    )
    template = processors.TemplateProcessing(
        single=[*first, "$A", *end],
        pair=[*first, "$A", *end, *first, "$B", *end],
        special_tokens=[(token, number) for token, number in known.items()],
    )
    given = json.loads(backend.to_str())["post_processor"] or {}
    kinds = [part["type"] for part in given.get("processors", [given]) if "type" in part]
    keeps_offsets = [processors.ByteLevel(trim_offsets=False)] if "ByteLevel" in kinds else []
    backend.post_processor = processors.Sequence([*keeps_offsets, template])


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", prompt: str, begin: bool = True) -> list[int]:
    """A prompt's tokens by the rule above; the text of special tokens becomes these tokens.

    Args:
        begin: put bos, or what else the tokenizer begins a text with, before it where the prompt does not begin with it;
            False: it is one that a chat template has rendered.
    """
    ids = plain_backend(tokenizer, True).encode(prompt, add_special_tokens=False).ids
    first = begin_of(tokenizer) if begin else []
    return ids if ids[: len(first)] == first else [*first, *ids]


class SpecialText:
    """The texts of a tokenizer's special tokens, to be found in documents.

    Those that are elements of HTML too, such as <s>, count only where a line begins or ends with one, as what a chat
    template writes does: sources of programs and web pages have them within lines.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._by_head: dict[str, list[str]] = {}  # a document without the head is searched for none of them
        self._edges: dict[str, re.Pattern[str]] = {}
        for text in special:
            if len(text) > 1:
                self._by_head.setdefault(text[:3], []).append(text)
            if _ELEMENT.fullmatch(text):
                escaped = re.escape(text)
                self._edges[text] = re.compile(rf"^[ \t]*{escaped}|{escaped}[ \t\r]*$", re.MULTILINE)

    def within(self, document: str) -> Iterable[str]:
        """Those that stand in a document, each once."""
        texts = [
            text for head, texts in self._by_head.items() if head in document for text in texts if text in document
        ]
        return [text for text in texts if text not in self._edges or self._edges[text].search(document)]


def report_special_text(name: str, seen: Mapping[str, int], documents: int, remedy: str) -> None:
    """Warn of text in which special tokens are spelt out: most often a chat template has written it.

    seen: by token, how many of the documents hold its text.
    """
    if not seen:
        return
    token, count = max(seen.items(), key=lambda item: item[1])
    logger.warning(
        "%s: %d of %d documents hold the text of the special token %r, which is read as ordinary text, not as that token: "
        "set %s if a chat template has written it, or use rows of chat",
        name, count, documents, token, remedy,
    )  # fmt: skip

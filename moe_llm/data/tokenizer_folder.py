"""A folder whose vocabulary is a sentencepiece model or tekken.json alone, as a tokenizer of transformers."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_llm.data import spm
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PROBES = [
    "",
    " ",
    "  two  spaces ",
    "def f(x):\n    return x  # comment\n\n\n\tpass",
    "1234567 3.14 0x1F",
    "naïve Ω 漢字 😀 \u200b e\u0301",
    "(" * 40 + " " * 40 + "=" * 40,
    "the quick brown fox, the lazy dog's",
]

_SETTINGS, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def from_sentencepiece(directory: Path) -> "PreTrainedTokenizerFast":
    """A directory whose only vocabulary is tokenizer.model: sentencepiece's own ids, and whatever the files beside it say
    of added tokens, special tokens and chat templates.

    transformers' own conversion gives other ids for some models ("hello world" has other tokens than sentencepiece's).

    Raises:
        UserError: a model or a file that cannot be used, or added tokens in the place of others.
    """
    from transformers import PreTrainedTokenizerFast

    model = (directory / "tokenizer.model").read_bytes()
    settings, special = json_of(directory / _SETTINGS), json_of(directory / _MAP)
    prefix = settings.get("add_prefix_space")
    if isinstance(prefix, bool) and model:
        model = _parsed(spm.with_dummy_prefix, model, str(directory), prefix)
    backend = converted(model, str(directory), exact=False)
    names = dict(spm.special_tokens(model))
    for key in _SPECIAL_TOKENS:
        said = settings.get(key) if settings.get(key) is not None else special.get(key)
        if said is not None:
            names[key] = _content(said)
        elif key in settings and key not in ("unk_token", "pad_token"):  # null: there is none
            names.pop(key, None)
    listed = _listed(directory, settings, {*names.values(), *_more_special(settings, special)})
    number = max([*backend.get_vocab().values(), *listed])
    known = {token.content for token in listed.values()}
    for text in _more_special(settings, special):
        if text not in known:
            there = backend.token_to_id(text)
            number += there is None
            listed[number if there is None else there] = _added(text, special=True)
    backend = _with_added(backend, listed, str(directory))
    more = {
        key: settings[key]
        for key in ("model_max_length", "padding_side", "truncation_side")
        if settings.get(key) is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, name_or_path=str(directory), **names, **more
    )
    templates = _chat_templates(directory, settings)
    if templates is not None:
        tokenizer.chat_template = templates
    return tokenizer


def _more_special(*files: dict[str, Any]) -> list[str]:
    """Special tokens without a role of their own, by each of the names that transformers has had for them."""
    found: list[str] = []
    for file in files:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            given = file.get(key) or []
            found += [_content(value) for value in (given.values() if isinstance(given, dict) else given)]
    return list(dict.fromkeys(found))


def _listed(directory: Path, settings: dict[str, Any], special: set[str]) -> dict[int, Any]:
    """Added tokens by id, as added_tokens.json and tokenizer_config.json list them."""
    listed: dict[int, Any] = {}
    for token, number in json_of(directory / _ADDED).items():
        if not isinstance(number, int) or number < 0:
            raise UserError(f"file {directory / _ADDED} is damaged: {token!r} has the id {number!r}: give it a number")
        listed[number] = _added(token, special=token in special)
    decoder = settings.get("added_tokens_decoder") or {}
    for number, spec in decoder.items() if isinstance(decoder, dict) else ():
        if not number.isdecimal() or not isinstance(spec, dict) or not isinstance(spec.get("content"), str):
            raise UserError(
                f"file {directory / _SETTINGS} is damaged: its added_tokens_decoder has {number!r}: "
                f"{json.dumps(spec)[:60]}: give an id and an object with its content"
            )
        flags = {flag: bool(spec.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        listed[int(number)] = _added(
            spec["content"], special=bool(spec.get("special")) or spec["content"] in special, **flags
        )
    return listed


def _added(text: str, special: bool, normalized: bool = False, **flags: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(text, normalized=normalized, special=special, **flags)


def from_tekken(directory: Path) -> "PreTrainedTokenizerFast":
    """A directory whose only vocabulary is tekken.json, as transformers converts it: mistral-common's own ids.

    Raises:
        UserError: the file is damaged, or of a form that transformers cannot read here.
    """
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    try:
        tokenizer: Any = convert_tekken_tokenizer(str(directory / "tekken.json"))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"tokenizer {str(directory)!r} cannot be loaded from its tekken.json ({reason}): replace it, or give a folder "
            "with tokenizer.json"
        ) from error
    tokenizer.name_or_path = str(directory)
    return tokenizer


def _with_added(backend: "Tokenizer", listed: dict[int, Any], origin: str) -> "Tokenizer":
    """A backend with tokens added at the ids that they are to have; ids may have holes.

    Raises:
        UserError: an id or a text that the vocabulary has otherwise.
    """
    from tokenizers import Tokenizer

    tokens = {number: token for token, number in backend.get_vocab().items()}
    content = json.loads(backend.to_str())
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    for number, token in sorted(listed.items()):
        known = backend.token_to_id(token.content)
        if known != number if known is not None else number in tokens:
            there = tokens.get(number, f"no token, and {token.content!r} has the id {known}")
            raise UserError(
                f"tokenizer {origin!r}: the added token {token.content!r} has the id {number}, at which its model has "
                f"{there!r}: correct its added_tokens"
            )
        content["model"]["vocab"][token.content] = number
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        added[number] = {
            "id": number, "content": token.content, **{flag: getattr(token, flag) for flag in flags},
        }  # fmt: skip
    content["added_tokens"] = [added[number] for number in sorted(added)]
    return Tokenizer.from_str(json.dumps(content)) if listed else backend


def _chat_templates(directory: Path, settings: dict) -> str | dict[str, str] | None:
    """The chat template, or the named ones, as transformers stores them: in files, or in tokenizer_config.json."""
    found: dict[str, str] = {}
    inside = settings.get("chat_template")
    if isinstance(inside, str):
        found["default"] = inside
    elif isinstance(inside, list):
        found |= {str(item["name"]): str(item["template"]) for item in inside}
    in_json = json_of(directory / "chat_template.json").get("chat_template")
    if isinstance(in_json, str):
        found["default"] = in_json
    file = directory / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8")
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    if set(found) == {"default"}:
        return found["default"]
    return found or None


def _content(value: object) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def json_of(file: Path) -> dict:
    """The object in a JSON file; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"file {file} is damaged ({error}): replace it") from error
    if not isinstance(found, dict):
        raise UserError(f"file {file} is damaged: it holds no JSON object: replace it")
    return found


@functools.lru_cache(maxsize=4)
def _converted_json(model: bytes, exact: bool) -> str:
    """The conversion takes most of a second, and commands read the same folder several times."""
    return spm.convert(model, exact).to_str()


def _parsed(read: Callable[..., Any], model: bytes, origin: str, *arguments: Any) -> Any:
    """What is read from a sentencepiece model.

    Raises:
        UserError: it cannot be used.
    """
    try:
        return read(model, *arguments)
    except ValueError as error:
        raise UserError(
            f"tokenizer.path={origin} is not a usable sentencepiece model: {_other_kind(model) or error}, give another "
            "model or a directory with tokenizer.json"
        ) from error


def _other_kind(model: bytes) -> str | None:
    """Words for a file that is called tokenizer.model and is none of sentencepiece's."""
    if re.fullmatch(rb"([A-Za-z0-9+/=]+ \d+\r?\n?)+", model[: model.find(b"\n", 1000) + 1] or model):
        return "it is a vocabulary of tiktoken's"
    if model.lstrip().startswith(b"{"):
        return "it is a JSON file, whose folder is to be named"
    return "it is a pointer of Git LFS, not the file itself" if model.startswith(b"version https://git-lfs") else None


def converted(model: bytes, origin: str, exact: bool) -> "Tokenizer":
    """A sentencepiece model as a backend of `tokenizers` with the same ids.

    Raises:
        UserError: it cannot be one.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(_parsed(_converted_json, model, origin, exact))
    if not spm.same_ids(backend, model, [*PROBES, *spm.texts_of_symbols(model)]):
        raise UserError(
            f"tokenizer.path={origin} has rules that tokenizer.json cannot express: "
            "give a directory with tokenizer.json"
        )
    return backend

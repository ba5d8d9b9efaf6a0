"""The run's tokenizer: built once, saved where `AutoTokenizer` finds it, and used from there."""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_llm.config import Config
from moe_llm.data import spm
from moe_llm.data.chat_template import template_setting, write_template
from moe_llm.data.files import building, publish, replace_file
from moe_llm.data.sources import (
    fingerprint,
    named_sources,
    named_validation_sources,
    source_bytes,
    source_settings,
)
from moe_llm.data.split import find_holdout, training_texts
from moe_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_KEY_FILE = "built_from.json"
_VERSION = 1
_PADDING = 256  # a vocabulary may be rounded up to a multiple of this
_LONG_TEXT = 65536  # characters; longer documents are sampled in part, shorter ones whole or not at all
_PROBES = [
    "",
    " ",
    "  two  spaces ",
    "def f(x):\n    return x  # comment\n\n\n\tpass",
    "1234567 3.14 0x1F",
    "naïve Ω 漢字 😀 \u200b e\u0301",
    "(" * 40 + " " * 40 + "=" * 40,
    "the quick brown fox, the lazy dog's",
]


def build_tokenizer(config: Config, directory: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a run, in `directory`; built if it is not there yet.

    Either `tokenizer.path` (a directory, a sentencepiece `.model` file or a hub name), or sentencepiece BPE
    trained on the training part of `data.sources`. Returns `AutoTokenizer.from_pretrained(directory)`.
    A directory keeps its tokenizer when the text changes later on, since a model depends on it. Safe to
    call from several processes at once.

    Raises:
        UserError: unusable tokenizer or text, or `directory` holds one built with other settings.
    """
    directory = Path(directory)
    key = _settings(config)
    cache = Path(config.data.cache_dir).expanduser()
    with building(cache, "tokenizer-" + hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:24]):
        if directory.exists() and any(directory.iterdir()):
            _check_built_from(directory, key)
        else:
            with publish(directory, field="run.dir") as temporary:
                _build(config, cache, temporary)
                tokenizer = load_tokenizer(temporary)
                check_vocab(config, tokenizer)  # a refused one leaves no directory behind
                write_template(config, tokenizer, temporary)
                (temporary / _KEY_FILE).write_text(json.dumps(key, indent=1) + "\n")
    return load_tokenizer(directory)


def load_tokenizer(directory: Path | str) -> "PreTrainedTokenizerFast":
    """A saved tokenizer, checked to be one that this package can train with.

    Raises:
        UserError: it cannot be read, or it has no `tokenizers` backend or end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    # No code beside the files is run, nor is it asked whether it may be. What has our own model's code beside it has a
    # plain tokenizer, for which a configuration of no model's is enough.
    options: dict = {"trust_remote_code": False}
    if _model_type(Path(directory) / "config.json") == "moe_llm":
        options["config"] = PreTrainedConfig()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"tokenizer {str(directory)!r} cannot be loaded ({reason}): "
            "give a tokenizer directory, a sentencepiece .model file or a reachable hub name"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"tokenizer {str(directory)!r} has no tokenizer.json: convert it or use another one")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {str(directory)!r} has no eos_token: set one in its tokenizer_config.json")
    return tokenizer


def _model_type(file: Path) -> str | None:
    """Of a checkpoint's config.json; None where there is none to be read, of which others tell."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("model_type") if isinstance(found, dict) else None


def _settings(config: Config) -> dict:
    template = template_setting(config)
    return _model_settings(config) | ({} if template is None else {"chat_template": template})


def _model_settings(config: Config) -> dict:
    """What decides the tokens, apart from the chat template."""
    if config.tokenizer.path is not None:
        return {"version": _VERSION, "path": config.tokenizer.path}
    return {
        "version": _VERSION,
        "vocab_size": config.model.vocab_size,
        "tokenizer": config.tokenizer.model_dump(mode="json"),
        "sources": [source_settings(source, "weight") for source in config.data.sources],
        "seed": config.run.seed,
    }


def _check_built_from(directory: Path, key: dict) -> None:
    try:
        found = json.loads((directory / _KEY_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} exists and holds no tokenizer of a run: choose another run.dir or remove it"
        ) from error
    ignored = (
        ["sources"] if any((directory.parent / "checkpoints").glob("step-*")) else []
    )  # these are compared by content
    differing = [name for name in {**key, **found} if key.get(name) != found.get(name) and name not in ignored]
    if not differing:
        return
    changed = differing[0]
    raise UserError(
        f"{directory} holds a tokenizer built with {changed}={json.dumps(found.get(changed))[:120]}, not "
        f"{json.dumps(key.get(changed))[:120]}: choose another run.dir or restore the setting"
    )


def _build(config: Config, cache: Path, target: Path) -> None:
    path = config.tokenizer.path
    if path is None:
        _save_model(_trained_model(config, cache), target, "data.sources", exact=True)
        return
    local = Path(path).expanduser()
    if local.is_dir() and (local / "tokenizer.model").exists() and not (local / "tokenizer.json").exists():
        local = local / "tokenizer.model"
    if local.is_file():
        _save_model(local.read_bytes(), target, path, exact=False)
        return
    if not local.is_dir() and (path.endswith(".model") or path.startswith((".", "/", "~"))):
        raise UserError(
            f"tokenizer.path={path} does not exist: give a tokenizer directory, a sentencepiece .model file "
            "or a hub name"
        )
    tokenizer = load_tokenizer(local if local.is_dir() else path)
    tokenizer.save_pretrained(target)
    if (local / "tokenizer.model").is_file():
        shutil.copyfile(local / "tokenizer.model", target / "tokenizer.model")


def _save_model(model: bytes, target: Path, origin: str, exact: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    try:
        backend = spm.convert(model, exact)
    except ValueError as error:
        raise UserError(
            f"tokenizer.path={origin} is not a usable sentencepiece model: {error}, give another model or "
            "a directory with tokenizer.json"
        ) from error
    if not spm.same_ids(backend, model, _PROBES):
        raise UserError(
            f"tokenizer.path={origin} has rules that tokenizer.json cannot express: "
            "give a directory with tokenizer.json"
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **spm.special_tokens(model)
    )
    tokenizer.save_pretrained(target)
    (target / "tokenizer.model").write_bytes(model)


def _trained_model(config: Config, cache: Path) -> bytes:
    """The sentencepiece model for a configuration; from the cache if the same text was trained on before."""
    import sentencepiece

    sources = named_sources(config) + named_validation_sources(config)
    inputs = [
        _model_settings(config),
        sentencepiece.__version__,
        [fingerprint(s, f) for f, s in sources],
        None if config.data.validation_sources else config.data.validation_fraction,
    ]
    file = cache / f"tokenizer-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]}.model"
    if file.exists():
        return file.read_bytes()
    logger.info("training a tokenizer of %d tokens", config.model.vocab_size)
    model = spm.train_model(
        _sampled(config),
        config.model.vocab_size,
        config.tokenizer.train_bytes,
        config.tokenizer.character_coverage,
        config.run.seed,
    )
    replace_file(file, model)
    return model


def _sampled(config: Config) -> Iterator[str]:
    """Training text for the tokenizer: of each source as much as its weight, or else its size, gives it."""
    holdout, sources = find_holdout(config), named_sources(config)
    sizes = [source_bytes(source, field) for field, source in sources]
    weights = [source.weight for _, source in sources]
    if None in weights:
        weights = [1.0] * len(sizes) if None in sizes else [float(size) for size in sizes]
    chosen = random.Random(config.run.seed)
    for (field, source), size, weight in zip(sources, sizes, weights):
        budget = config.tokenizer.train_bytes * weight / sum(weights)
        # Spread over the source; a fifth more than the budget, because a draw can fall short of it.
        share = 1.0 if size is None else min(1.0, 1.2 * budget / size)
        for text in training_texts(field, source, holdout):
            if len(text) > _LONG_TEXT:
                text = text[: max(_LONG_TEXT, int(share * len(text)))]
            elif chosen.random() >= share:
                continue
            text = text[: max(1, int(budget))]
            yield text
            budget -= len(text.encode("utf-8"))
            if budget <= 0:
                break


def check_vocab(config: Config, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a `model.vocab_size` that the tokenizer does not fit, or that leaves much of it unused.

    Raises:
        UserError: below the tokenizer's size, or above it rounded up to a multiple of 256.
    """
    size, given = len(tokenizer), config.model.vocab_size
    most = -(-size // _PADDING) * _PADDING
    if given is not None and not size <= given <= most:
        raise UserError(
            f"model.vocab_size={given} does not match the tokenizer of {size} tokens: "
            f"use {size}" + (f", or up to {most}" if most > size else "") + ", or null"
        )


def resolve_vocab(config: Config, tokenizer: "PreTrainedTokenizerFast") -> Config:
    """The configuration with `model.vocab_size` set; from the tokenizer where it was null."""
    check_vocab(config, tokenizer)
    if config.model.vocab_size is not None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": len(tokenizer)})})


def content_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Identifies what a tokenizer does to corpus documents: its tokenizer.json, bos and eos."""
    parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.bos_token_id), str(tokenizer.eos_token_id)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()

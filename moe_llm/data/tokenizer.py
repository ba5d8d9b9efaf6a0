"""The run's tokenizer: built once, saved where `AutoTokenizer` finds it, and used from there."""

import hashlib
import json
import logging
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_llm.config import Config, SourceConfig
from moe_llm.data import spm
from moe_llm.data.chat_template import template_setting, turn_end_id, write_template
from moe_llm.data.documents import has_no_bos, obey_add_bos_token, vocabulary_size
from moe_llm.data.files import building, errors_of_rust, publish, remember
from moe_llm.data.pieces import Piece
from moe_llm.data.sources import (
    fingerprint,
    named_sources,
    named_validation_sources,
    shards_of,
    source_bytes,
    source_settings,
)
from moe_llm.data.split import find_holdout, training_texts
from moe_llm.data.tokenizer_folder import PROBES, converted, from_sentencepiece, from_tekken, json_of
from moe_llm.errors import UserError
from moe_llm.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_KEY_FILE = "built_from.json"
_VERSION = 1
_PADDING = 256  # a vocabulary may be rounded up to a multiple of this
READ_WHOLE_BYTES = 256 * 2**20  # of a source; of a larger one, some shards are read for the sample
_SPREAD_SHARDS = 16
_LONG_TEXT = 65536  # characters; longer documents are sampled in part, shorter ones whole or not at all


def build_tokenizer(config: Config, directory: Path, *, same_sources: bool = False) -> "PreTrainedTokenizerFast":
    """The tokenizer of a run, in `directory`; built if it is not there yet.

    Either `tokenizer.path` (a directory, a sentencepiece `.model` file or a hub name), or sentencepiece BPE
    trained on the training part of `data.sources`. Returns `AutoTokenizer.from_pretrained(directory)`.
    A directory keeps its tokenizer when the text changes later on, since a model depends on it. Safe to
    call from several processes at once.

    Args:
        same_sources: warn of a trained run's tokenizer of other `data.sources`, which nothing else compares where no run
            resumes.

    Raises:
        UserError: unusable tokenizer or text, or `directory` holds one built with other settings.
    """
    directory = Path(directory)
    key = _settings(config)
    cache = Path(config.data.cache_dir).expanduser()
    with building(cache, "tokenizer-" + hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:24]):
        if directory.exists() and any(directory.iterdir()):
            _check_built_from(directory, key, same_sources)
        else:
            with publish(directory, field="run.dir") as temporary:
                _build(config, cache, temporary)
                tokenizer = load_tokenizer(temporary)
                check_vocab(config, tokenizer)  # a refused one leaves no directory behind
                write_template(config, tokenizer, temporary)
                _write_ends(config, tokenizer, temporary)
                _settle_class(temporary, tokenizer)
                (temporary / _KEY_FILE).write_text(json.dumps(key, indent=1) + "\n")
    return load_tokenizer(directory)


# Files of which a folder with a tokenizer has at least one.
_VOCABULARIES = ("*tokenizer*", "tekken.json", "vocab.*", "*.model", "*.tiktoken")


@progress("loading the tokenizer")
def load_tokenizer(directory: Path | str, needs_eos: bool = True) -> "PreTrainedTokenizerFast":
    """A saved tokenizer, checked to be one that this package can train with.

    Args:
        needs_eos: refuse one without an end-of-text token.

    Raises:
        UserError: it cannot be read, or it has no `tokenizers` backend or end-of-text token.
    """
    from transformers import PreTrainedTokenizerFast

    local = Path(directory).expanduser()
    vocabularies = (("tokenizer.model", from_sentencepiece), ("tekken.json", from_tekken))
    alone = next((read for name, read in vocabularies if (local / name).is_file()), None)
    if alone is not None and not (local / "tokenizer.json").is_file():
        tokenizer = alone(local)
        begins = True if alone is from_tekken else None  # mistral-common begins a text with bos
        obey_add_bos_token(tokenizer, json_of(local / "tokenizer_config.json").get("add_bos_token", begins))
        _check_usable(tokenizer, directory, needs_eos)
        return tokenizer
    # No code beside the files is run, nor is it asked whether it may be. What has our own model's code beside it has a
    # plain tokenizer, for which a configuration of no model's is enough.
    options: dict = {"trust_remote_code": False}
    # As tokenizer.json says. The Auto class would take mistral-common's tokenizer beside tekken.json, and would build
    # LlamaTokenizer by rules of its own, with other ids for spaces, wherever config.json is not there to prevent it.
    named = json_of(local / "tokenizer_config.json")
    plain = (local / "tokenizer.json").is_file() and "auto_map" not in named
    generic = plain and ("eos_token" in named or (local / "tekken.json").is_file())  # else the class may know the end
    loader: Any = PreTrainedTokenizerFast
    if not generic:  # the Auto class takes a third of a second to import
        from transformers import AutoTokenizer, PreTrainedConfig

        loader = AutoTokenizer
        if _model_type(Path(directory) / "config.json") == "moe_llm":
            options["config"] = PreTrainedConfig()  # a class of its own would keep it, and could not be saved
    try:
        tokenizer = loader.from_pretrained(str(local if local.is_dir() else directory), **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "give a tokenizer directory, a sentencepiece .model file or a reachable hub name"
        if local.is_dir() and not any(file for pattern in _VOCABULARIES for file in local.glob(pattern)):
            reason = "it holds no tokenizer.json, tokenizer.model, tekken.json or vocab.json"
        elif "auto_map" in named and (local / "tokenizer.json").is_file():
            reason = "its tokenizer_config.json names code of its own, auto_map, and no such code is run"
            remedy = "remove auto_map from it, and tokenizer.json is read as it is"
        raise UserError(f"tokenizer {str(directory)!r} cannot be loaded ({reason}): {remedy}") from error
    _check_usable(tokenizer, directory, needs_eos)
    obey_add_bos_token(tokenizer, named.get("add_bos_token"))
    return tokenizer


def _check_usable(tokenizer: "PreTrainedTokenizerFast", directory: Path | str, needs_eos: bool) -> None:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"tokenizer {str(directory)!r} has no tokenizer.json: convert it or use another one")
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {str(directory)!r} has no eos_token: set one in its tokenizer_config.json")


GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tekken.json", "chat_template*", "additional_chat_templates/*", GENERATION_FILE,
)  # fmt: skip


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer's files so that its neighbours read them too.

    With it goes the sentencepiece model that it was made from, where there is one: llama.cpp's converter takes the
    pieces' scores from there. What transformers drops of its tokenizer_config.json stays, the class above all; a class
    that transformers 4 does not know gets the name of the one that it does, which reads the same ids from the same
    tokenizer.json.
    """
    with errors_of_rust():
        tokenizer.save_pretrained(str(directory))
    file, origin = directory / _SETTINGS_FILE, tokenizer_directory(tokenizer)
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        given = {} if origin is None else json_of(origin / _SETTINGS_FILE)
        settings |= {key: given[key] for key in _DROPPED if key in given}
        # other classes build rules from this key
        if settings.get("tokenizer_class") in _PLAIN_CLASSES and _begins_without_space(tokenizer):
            settings.setdefault("add_prefix_space", False)
        _write_settings(directory, settings)
    if origin is not None and (origin / "tokenizer.model").is_file() and not (directory / "tokenizer.model").exists():
        shutil.copyfile(origin / "tokenizer.model", directory / "tokenizer.model")


def _begins_without_space(tokenizer: Any) -> bool:
    """Whether conversations begin with a special token, and no space is put in after it.

    transformers reads that from tokenizer.json. llama.cpp puts a space in after every special token, or at no place:
    its converter looks for `add_prefix_space`, which changes no ids in transformers.
    """
    if getattr(tokenizer, "chat_template", None) is None or getattr(tokenizer, "backend_tokenizer", None) is None:
        return False
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except Exception:  # noqa: BLE001  a template of others, which may ask for anything
        return False
    first = next((token for token in tokenizer.all_special_tokens if text.startswith(token)), None)
    if first is None:
        return False
    alone, after = (tokenizer.encode(text, add_special_tokens=False) for text in ("x", f"{first}x"))
    return alone != after[1:]


_SETTINGS_FILE = "tokenizer_config.json"
# Of tokenizer_config.json, what transformers 5 does not write again.
_DROPPED = ("tokenizer_class", "add_bos_token", "add_eos_token", "legacy", "spaces_between_special_tokens")
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_PLAIN_CLASSES = ("TokenizersBackend", _PLAIN_CLASS)


def _write_settings(directory: Path, settings: dict[str, Any]) -> None:
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings = settings | {"tokenizer_class": _PLAIN_CLASS}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / _SETTINGS_FILE).write_text(text, encoding="utf-8")


def _settle_class(directory: Path, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Leave a folder the class that it names only where transformers reads this tokenizer's ids by it: some classes build
    rules of their own in place of those in tokenizer.json."""
    from transformers import AutoTokenizer

    settings = json_of(directory / _SETTINGS_FILE)
    if settings.get("tokenizer_class") in (None, _PLAIN_CLASS):
        return
    try:
        named = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        same = all(
            named.encode(t, add_special_tokens=False) == tokenizer.encode(t, add_special_tokens=False) for t in PROBES
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        same = False  # a class that is not there, or cannot be built from these files
    if not same:
        _write_settings(directory, settings | {"tokenizer_class": _PLAIN_CLASS})


def tokenizer_directory(tokenizer: Any) -> Path | None:
    """The local directory that a tokenizer was loaded from, if it was."""
    name = getattr(tokenizer, "name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None


def base_generation(tokenizer: Any) -> dict:
    """The generation_config.json beside a tokenizer: that of the model that it came with, whose end tokens and sampling
    defaults a model trained from it keeps. Empty where there is none."""
    origin = tokenizer_directory(tokenizer)
    return {} if origin is None else json_of(origin / GENERATION_FILE)


def end_token_ids(tokenizer: Any) -> list[int]:
    """The tokens at which a model with this tokenizer stops: those of the generation_config.json that it came with, or
    else its end of text and, where its chat template ends the assistant's turn in a special token, that one."""
    given = base_generation(tokenizer).get("eos_token_id")
    if given is not None:
        return list(given) if isinstance(given, list) else [given]
    ends = [tokenizer.eos_token_id, turn_end_id(tokenizer)]
    return [end for end in dict.fromkeys(ends) if end is not None]


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
    ends = {} if config.tokenizer.end_tokens is None else {"end_tokens": config.tokenizer.end_tokens}
    if config.tokenizer.path is not None:
        return {"version": _VERSION, "path": config.tokenizer.path, **ends}
    return {
        "version": _VERSION,
        "vocab_size": config.model.vocab_size,
        "tokenizer": config.tokenizer.model_dump(mode="json", exclude=set() if ends else {"end_tokens"}),
        "sources": [source_settings(source, "weight") for source in config.data.sources],
        "seed": config.run.seed,
    }


def _check_built_from(directory: Path, key: dict, same_sources: bool) -> None:
    try:
        found = json.loads((directory / _KEY_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} exists and holds no tokenizer of a run: choose another run.dir or remove it"
        ) from error
    trained = any((directory.parent / "checkpoints").glob("step-*"))
    ignored = ["sources"] if trained else []  # these are compared by content
    if trained and same_sources and key.get("sources") != found.get("sources"):
        logger.warning(
            "%s is of a run on other data.sources and is used for these: give a run.dir of its own to what is another run",
            directory,
        )
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
        _save_model(
            _trained_model(config, cache),
            target,
            "data.sources",
            exact=True,
            length=config.model.max_position_embeddings,
        )
        return
    local = Path(path).expanduser()
    if local.is_file():
        _save_model(local.read_bytes(), target, path, exact=False)
        return
    if not local.is_dir() and (path.endswith(".model") or path.startswith((".", "/", "~"))):
        raise UserError(
            f"tokenizer.path={path} does not exist: give a tokenizer directory, a sentencepiece .model file "
            "or a hub name"
        )
    tokenizer = load_tokenizer(local if local.is_dir() else path)
    save_tokenizer(tokenizer, target)
    if (local / GENERATION_FILE).is_file():
        shutil.copyfile(local / GENERATION_FILE, target / GENERATION_FILE)


def _write_ends(config: Config, tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Put beside a run's tokenizer at which tokens its model stops, where that is configured, or where the checkpoint that
    the run begins with says it in its config.json alone: where transformers, too, looks then.

    Raises:
        UserError: `tokenizer.end_tokens` names none of the tokenizer's tokens.
    """
    file, ends = directory / GENERATION_FILE, None
    if config.tokenizer.end_tokens is not None:
        vocabulary = tokenizer.get_vocab()
        for token in config.tokenizer.end_tokens:
            if token not in vocabulary:
                raise UserError(f"tokenizer.end_tokens: {token!r} is no token of the tokenizer: name one of its tokens")
        ends = [vocabulary[token] for token in config.tokenizer.end_tokens]
    elif config.model.init_from is not None and not file.is_file():
        ends = json_of(Path(config.model.init_from).expanduser() / "config.json").get("eos_token_id")
    if ends is not None:
        file.write_text(json.dumps(json_of(file) | {"eos_token_id": ends}, indent=2) + "\n", encoding="utf-8")


def _save_model(model: bytes, target: Path, origin: str, exact: bool, length: int | None = None) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = converted(model, origin, exact)
    more = {} if length is None else {"model_max_length": length}
    names = spm.special_tokens(model)
    if exact and "pad_token" not in names:
        names["pad_token"] = names["unk_token"]  # which no text has, since bytes stand for what has no token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names, **more)
    save_tokenizer(tokenizer, target)
    (target / "tokenizer.model").write_bytes(model)


def _trained_model(config: Config, cache: Path) -> bytes:
    """The sentencepiece model for a configuration; from the cache if the same text was trained on before."""
    import sentencepiece

    sources = named_sources(config) + named_validation_sources(config)
    inputs = [
        _model_settings(config),
        sentencepiece.__version__,
        [fingerprint(s, f, cache) for f, s in sources],
        None if config.data.validation_sources else config.data.validation_fraction,
    ]
    file = cache / f"tokenizer-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]}.model"
    written = file.with_suffix(".sha256")
    if file.exists() and written.exists():  # a version before had no checksums
        model = file.read_bytes()
        if hashlib.sha256(model).hexdigest() == written.read_text(encoding="utf-8", errors="replace"):
            return model
        logger.warning("the tokenizer in %s is not what was written (SHA-256); it is trained again", file)
    logger.info("training a tokenizer of %d tokens", config.model.resolved_vocab_size)
    with progress("training the tokenizer"):
        model = spm.train_model(
            _sampled(config),
            config.model.resolved_vocab_size,
            config.tokenizer.train_bytes,
            config.tokenizer.character_coverage,
            config.run.seed,
        )
    remember(written, hashlib.sha256(model).hexdigest().encode())
    remember(file, model)
    return model


def _sampled(config: Config) -> Iterator[str]:
    """Training text for the tokenizer: of each source as much as its weight, or else its size, gives it."""
    holdout, sources = find_holdout(config), named_sources(config)
    sizes = [source_bytes(source, field) for field, source in sources]
    weights = [source.weight for _, source in sources if source.weight is not None]
    if not weights:
        known = [float(size) for size in sizes if size is not None]
        weights = known if len(known) == len(sizes) else [1.0] * len(sizes)
    chosen = random.Random(config.run.seed)
    for (field, source), size, weight in zip(sources, sizes, weights):
        budget = config.tokenizer.train_bytes * weight / sum(weights)
        pieces = None
        if size is not None and size > READ_WHOLE_BYTES:
            pieces, size = _spread(source, field, budget)
        # Spread over the source; a fifth more than the budget, because a draw can fall short of it.
        share = 1.0 if size is None else min(1.0, 1.2 * budget / size)
        for text in training_texts(field, source, holdout, pieces):
            if len(text) > _LONG_TEXT:
                text = text[: max(_LONG_TEXT, int(share * len(text)))]
            elif chosen.random() >= share:
                continue
            text = text[: max(1, int(budget))]
            yield text
            budget -= len(text.encode("utf-8"))
            if budget <= 0:
                break


def _spread(source: SourceConfig, field: str, budget: float) -> tuple[list[Piece], int]:
    """Shards of a large source, evenly spread over it, and their bytes: what the sample is drawn from."""
    shards = shards_of(source, field)
    total = sum(piece.size for shard in shards for piece in shard)
    count = min(len(shards), max(_SPREAD_SHARDS, math.ceil(4 * budget * len(shards) / max(total, 1))))
    pieces = [piece for i in range(count) for piece in shards[i * len(shards) // count]]
    read = sum(piece.size for piece in pieces)
    logger.info("%s: the tokenizer's sample is drawn from %.0f of %.0f MB", field, read / 1e6, total / 1e6)
    return pieces, read


def check_vocab(config: Config, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a `model.vocab_size` that the tokenizer does not fit, or that leaves much of it unused.

    Raises:
        UserError: below the tokenizer's size, unless `model.resize_embeddings` adds rows, or above it rounded up to a
            multiple of 256, where no checkpoint brings its own number of rows.
    """
    size, given = vocabulary_size(tokenizer), config.model.vocab_size
    most = -(-size // _PADDING) * _PADDING
    if config.model.init_from is not None and given is not None:
        most = max(most, given)  # the rows that a checkpoint has stay
    if given is not None and given < size and config.model.init_from is not None:
        if config.model.resize_embeddings:
            return
        raise UserError(
            f"the tokenizer has {size} tokens, and model.init_from={config.model.init_from!r} {given} rows of embeddings: "
            "set model.resize_embeddings=true, which adds rows, each the mean of those that are there, or use its tokenizer"
        )
    if given is not None and not size <= given <= most:
        raise UserError(
            f"model.vocab_size={given} does not match the tokenizer of {size} tokens: "
            f"use {size}" + (f", or up to {most}" if most > size else "") + ", or null"
        )


def resolve_vocab(config: Config, tokenizer: "PreTrainedTokenizerFast") -> Config:
    """The configuration with `model.vocab_size` set; from the tokenizer where it was null, or has more tokens and
    `model.resize_embeddings` adds rows."""
    check_vocab(config, tokenizer)
    size = max(vocabulary_size(tokenizer), config.model.vocab_size or 0)
    if config.model.vocab_size == size:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def copy_tokenizer(source: Path, target: Path) -> None:
    """A folder's tokenizer and generation_config.json as they are, named templates in their subfolder included."""
    for pattern in _TOKENIZER_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def content_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Identifies what a tokenizer does to corpus documents: its tokenizer.json, bos and eos."""
    parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.bos_token_id), str(tokenizer.eos_token_id)]
    if tokenizer.bos_token_id is not None and has_no_bos(tokenizer):
        parts.append("no bos")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()

"""The share of blocks' places that hold tokens, as the last preparation of the same data has found it.

What only counts tokens, such as `moe-llm plan`, knows it from here without reading text. Files are told apart by name and
size alone, since a wrong share would shift an estimate and nothing else.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from moe_llm.config import Config
from moe_llm.data.files import remember
from moe_llm.data.sources import list_files, named_sources, named_validation_sources, source_settings
from moe_llm.errors import UserError

_IRRELEVANT = {"sources", "validation_sources", "cache_dir", "num_workers", "allow_changed", "bootstrap_seed"}


def remember_fill(config: Config, fill: float) -> None:
    """Note the share in the cache, where it is not noted already."""
    file = _file(config)
    if file is not None and known_fill(config) != fill:
        remember(file, json.dumps(fill).encode())


def known_fill(config: Config) -> float | None:
    """The share of the run's training blocks that holds tokens; None where its data have not been prepared here."""
    file = _file(config)
    try:
        return None if file is None else float(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # torn by a full disk: the next preparation notes it again
        return None


def with_known_fill(config: Config) -> Config:
    """The configuration with that share, so that its `max_steps` counts tokens and no padding; as it is where none is
    known."""
    fill = known_fill(config)
    return config if fill is None else config.with_fill(fill)


def _file(config: Config) -> Path | None:
    """None where the files are not on this machine."""
    data: Any = config.data.model_dump(mode="json", exclude=_IRRELEVANT)
    try:
        sources = []
        for field, source in [*named_sources(config), *named_validation_sources(config)]:
            here = source.type != "hub" and not source.streaming
            files = [[path.name, path.stat().st_size] for path in list_files(source, field)] if here else [source.path]
            sources.append([source_settings(source, "path"), files])
    except UserError:  # a plan may be made where there is no data; whoever reads them says what is wrong
        return None
    length = config.train.model_dump(include={"max_steps", "max_tokens", "global_batch_size"}) if data["stages"] else {}
    tokenizer = config.tokenizer.model_dump(mode="json", exclude={"end_tokens"})
    vocabulary = config.model.vocab_size if config.tokenizer.path is None else None
    key = json.dumps([data, sources, length, tokenizer, vocabulary], sort_keys=True)
    return Path(config.data.cache_dir).expanduser() / f"fill-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

"""`moe-llm prepare CONFIG`: everything that a run reads, tokenised and checked before any accelerator waits for it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from moe_llm.config import Config, SourceConfig
from moe_llm.data.cache import shard_checksums
from moe_llm.data.files import replace_file
from moe_llm.data.loader import Data, load_data
from moe_llm.data.shards import Share, settings_of, tokenise_share
from moe_llm.data.sources import (
    check_sources,
    file_records,
    hub_listing,
    local_dataset,
    named_sources,
    named_validation_sources,
)
from moe_llm.data.split import HoldOut, find_holdout
from moe_llm.data.tokenizer import build_tokenizer, check_vocab, content_hash, resolve_vocab


def prepare(config: Config, *, show_progress: bool = True) -> dict[str, Any]:
    """Train or fetch the tokenizer, tokenise every source into `data.cache_dir`, and compare what is there already with
    its checksums. `train` with the same `data`, `tokenizer` and `run.dir` then starts from it.

    Returns:
        The manifest, which is also written to `data.cache_dir` as manifest-HASH.json: `hash` is that of the tokenizer
        and of each source's tokens, in the order in which they are read; `sources` has counts and checksum of each
        source and split; `shards` has the checksum of each shard; `files` has size and SHA-256 of each source file, or
        the addresses of a dataset's files on the hub, with their revision.

    Raises:
        UserError: unusable sources, a tokenizer that does not fit, or no space left.
    """
    check_sources(config)
    tokenizer = build_tokenizer(config, Path(config.run.dir) / "tokenizer", same_sources=True)
    config = resolve_vocab(config, tokenizer)
    check_vocab(config, tokenizer)
    data = load_data(config, tokenizer, show_progress=show_progress)
    found = manifest(config, data, content_hash(tokenizer))
    path = Path(config.data.cache_dir).expanduser() / f"manifest-{found['hash'][:24]}.json"
    replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
    return found | {"path": str(path)}


def prepare_share(config: Config, share: tuple[int, int]) -> list[dict[str, Any]]:
    """Tokenise the shards of machine `share[0]`, from 0, of `share[1]`: for machines that share no file system, or one
    that does not lock. When those of all are in one `data.cache_dir`, `prepare` completes what they have made.

    Returns:
        Of each source the number of its shards, how many of them are this machine's, and where they lie.

    Raises:
        UserError: as `prepare`.
    """
    check_sources(config)
    tokenizer = build_tokenizer(config, Path(config.run.dir) / "tokenizer", same_sources=True)
    config = resolve_vocab(config, tokenizer)
    holdout = find_holdout(config)
    parts = [(field, source, holdout) for field, source in named_sources(config)]
    parts += [(field, source, HoldOut()) for field, source in named_validation_sources(config)]
    told = []
    for field, source, divide in parts:
        if source.streaming:  # it is tokenised while it is trained on
            continue
        mine, shards, where = tokenise_share(
            source, field, divide, tokenizer, share=Share(*share), show_progress=True, **settings_of(config.data)
        )
        told.append({"source": field, "mine": mine, "shards": shards, "directory": str(where)})
    return told


def format_share(told: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{part['source']}: {part['mine']} of {part['shards']} shards are there, in {part['directory']}"
        for part in told
    )


def manifest(config: Config, data: Data, tokenizer_hash: str) -> dict[str, Any]:
    """What a run's data is made from; equal for equal files, tokenizer and settings, wherever they lie."""
    prints = [part._asdict() for part in data.fingerprint]
    digest = hashlib.sha256(json.dumps([tokenizer_hash, prints], sort_keys=True).encode()).hexdigest()
    cache = Path(config.data.cache_dir).expanduser()
    trained, held_out = named_sources(config), named_validation_sources(config)
    texts = [*zip(trained, data.train.sources), *zip(held_out, data.validation.sources)]
    blocks = {(part.name, part.split): part for part in data.statistics}
    return {
        "hash": digest,
        "tokenizer": tokenizer_hash,
        "sources": [
            entry | ({} if part is None else {name: getattr(part, name) for name in _COUNTED})
            for entry in prints
            for part in [blocks.get((entry["source"], entry["split"]))]
        ],
        "shards": {
            field: shard_checksums(cache / str(part.text.key).partition("/")[0])
            for (field, source), part in texts
            if not source.streaming
        },
        "files": {
            field: _files(source, field, cache) for field, source in [*trained, *held_out] if not source.streaming
        },
    }


def _files(source: SourceConfig, field: str, cache: Path) -> list[dict[str, Any]]:
    if source.type == "hub" and local_dataset(source) is None:
        return [{"name": address} for address in hub_listing(source, field, cache)]
    return [{"name": name, "size": size, "sha256": digest} for name, size, digest in file_records(source, field, cache)]


_COUNTED = ("bytes", "blocks", "dropped", "truncated")


def format_manifest(found: dict[str, Any]) -> str:
    """A line for each source and split, and where the manifest is."""
    lines = [
        f"{part['source']} ({part['split']}): {part['documents']:,} documents, {part['tokens']:,} tokens"
        + (f", {part['blocks']:,} blocks" if "blocks" in part else "")
        + (f", {part['dropped']:,} left out, longer than a block" if part.get("dropped") else "")
        + (f", {part['truncated']:,} cut to a block" if part.get("truncated") else "")
        for part in found["sources"]
    ]
    return "\n".join([*lines, f"manifest {found['hash'][:12]}: {found['path']}"])

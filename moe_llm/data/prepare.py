"""`moe-llm prepare CONFIG`: everything that a run reads, tokenised and checked before any accelerator waits for it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from moe_llm.config import Config
from moe_llm.data.files import replace_file
from moe_llm.data.loader import Data, load_data
from moe_llm.data.sources import check_sources, list_files, named_sources, named_validation_sources
from moe_llm.data.tokenizer import build_tokenizer, check_vocab, content_hash, resolve_vocab


def prepare(config: Config, *, show_progress: bool = True) -> dict[str, Any]:
    """Train or fetch the tokenizer, tokenise every source into `data.cache_dir`, and compare what is there already with
    its checksums. `train` with the same `data`, `tokenizer` and `run.dir` then starts from it.

    Returns:
        The manifest, which is also written to `data.cache_dir` as manifest-HASH.json: `hash` is that of the tokenizer
        and of each source's tokens, in the order in which they are read; `sources` has counts and checksum of each
        source and split; `files` has size and SHA-256 of each source file.

    Raises:
        UserError: unusable sources, a tokenizer that does not fit, or no space left.
    """
    check_sources(config)
    tokenizer = build_tokenizer(config, Path(config.run.dir) / "tokenizer")
    config = resolve_vocab(config, tokenizer)
    check_vocab(config, tokenizer)
    data = load_data(config, tokenizer, show_progress=show_progress)
    found = manifest(config, data, content_hash(tokenizer))
    path = Path(config.data.cache_dir).expanduser() / f"manifest-{found['hash'][:24]}.json"
    replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
    return found | {"path": str(path)}


def manifest(config: Config, data: Data, tokenizer_hash: str) -> dict[str, Any]:
    """What a run's data is made from; equal for equal files, tokenizer and settings, wherever they lie."""
    prints = [part._asdict() for part in data.fingerprint]
    digest = hashlib.sha256(json.dumps([tokenizer_hash, prints], sort_keys=True).encode()).hexdigest()
    sources = named_sources(config) + named_validation_sources(config)
    blocks = {(part.name, part.split): part for part in data.statistics}
    return {
        "hash": digest,
        "tokenizer": tokenizer_hash,
        "sources": [
            entry | ({"bytes": part.bytes, "blocks": part.blocks} if part is not None else {})
            for entry in prints
            for part in [blocks.get((entry["source"], entry["split"]))]
        ],
        "files": {
            field: [_file_record(path) for path in list_files(source, field)]
            for field, source in sources
            if source.type != "hub"
        },
    }


def format_manifest(found: dict[str, Any]) -> str:
    """A line for each source and split, and where the manifest is."""
    lines = [
        f"{part['source']} ({part['split']}): {part['documents']:,} documents, {part['tokens']:,} tokens"
        + (f", {part['blocks']:,} blocks" if "blocks" in part else "")
        for part in found["sources"]
    ]
    return "\n".join([*lines, f"manifest {found['hash'][:12]}: {found['path']}"])


def _file_record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "name": path.name,
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }

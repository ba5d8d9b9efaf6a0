"""Sub-commands that prepare a run."""

from pathlib import Path

from moe_llm.config import Config
from moe_llm.data.sources import check_sources
from moe_llm.data.tokenizer import build_tokenizer, check_vocab, resolve_vocab


def build_tokenizer_command(config: Config) -> str:
    """Train or fetch the run's tokenizer; says what there is now, and where."""
    check_sources(config)
    directory = Path(config.run.dir) / "tokenizer"
    tokenizer = build_tokenizer(config, directory)
    check_vocab(resolve_vocab(config, tokenizer), tokenizer)
    return f"tokenizer of {len(tokenizer):,} entries: {directory}"

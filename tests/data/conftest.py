"""Shared by the tests of the data layer: small configurations, a small trained tokenizer."""

import random

import pytest

from moe_llm.config import Config
from moe_llm.data.loader import PackedBlocks
from moe_llm.data.tokenizer import build_tokenizer

WORDS = [
    "def",
    "return",
    "the",
    "router",
    "sends",
    "tokens",
    "to",
    "experts",
    "naïve",
    "漢字",
    "x1",
    "(a, b):",
    "\n    ",
]


@pytest.fixture(scope="session")
def make_text():
    def make(seed: int, words: int = 60) -> str:
        rng = random.Random(seed)
        return " ".join(rng.choice(WORDS) for _ in range(words)) + f" {seed}\n"

    return make


@pytest.fixture
def make_config(tmp_path):
    """A configuration of `files` sources, with sections merged in: make_config({"data": {...}})."""

    def make(sources, **sections) -> Config:
        raw = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"vocab_size": 330},
            "data": {
                "sources": sources,
                "cache_dir": str(tmp_path / "cache"),
                "sequence_length": 16,
                "num_workers": 1,
            },
            "train": {"max_steps": 1},
        }
        for name, values in sections.items():
            raw[name] = {**raw.get(name, {}), **values}
        return Config.model_validate(raw)

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, make_text):
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "corpus.txt").write_text("".join(make_text(seed) for seed in range(200)), encoding="utf-8")
    config = Config.model_validate(
        {
            "model": {"vocab_size": 330},
            "data": {
                "sources": [{"type": "files", "path": str(root / "corpus.txt")}],
                "cache_dir": str(root / "cache"),
            },
            "train": {"max_steps": 1},
        }
    )
    return build_tokenizer(config, root / "tokenizer")


@pytest.fixture(scope="session")
def random_blocks():
    """Blocks of random documents: bos 1, eos 2, every other token unique in the source."""
    import numpy as np

    from moe_llm.data.cache import TokenizedText

    def make(lengths: list[int], sequence_length: int, isolate: bool = True, first_id: int = 10) -> PackedBlocks:
        documents, next_id = [], first_id
        for length in lengths:
            documents.append([1, *range(next_id, next_id + length), 2])
            next_id += length
        starts = np.cumsum([0] + [len(d) for d in documents])
        sizes = np.array([3 * length for length in lengths])
        tokens = np.concatenate(documents).astype(np.uint32)
        text = TokenizedText(tokens, starts, sizes, int(sizes.sum()))
        return PackedBlocks(text, sequence_length, isolate, pad=2)

    return make

"""Documents in similar order: each is there once, neighbours are alike, and nothing else about a run is different."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_llm.config import load_config
from moe_llm.config.load import validate
from moe_llm.data.cache import TokenizedText
from moe_llm.data.loader import TrainLoader, load_data
from moe_llm.data.similar import similar_order
from moe_llm.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
SUBJECTS = [
    "router gate expert token choice",
    "bread flour oven yeast crust",
    "violin cello bow string sonata",
    "glacier moraine ice valley fjord",
    "ledger audit tax invoice asset",
]


@pytest.fixture
def run(tmp_path, make_config):
    """A run on documents of five subjects, in turn."""
    rng = random.Random(0)
    rows = [
        {"text": " ".join(rng.choice(SUBJECTS[i % 5].split()) for _ in range(rng.randint(12, 40))) + f" {i}"}
        for i in range(100)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(order: str, seed: int = 0):
        sources = [{"type": "files", "path": str(tmp_path / "corpus.jsonl")}]
        return make_config(
            sources,
            run={"dir": str(tmp_path / "run"), "seed": seed},
            data={**make_config(sources).data.model_dump(mode="json"), "order": order, "validation_fraction": 0.1},
        )

    return make


def documents(text: TokenizedText) -> list[bytes]:
    return [text.tokens_N[a:b].tobytes() for a, b in zip(text.starts, text.starts[1:])]


def likeness(text: TokenizedText) -> float:
    """The mean cosine of neighbours' TF-IDF vectors, nothing hashed."""
    bags = [Counter(text.tokens_N[a:b].tolist()) for a, b in zip(text.starts, text.starts[1:])]
    having = Counter(token for bag in bags for token in bag)
    vectors = np.zeros((len(bags), max(having) + 1))
    for row, bag in enumerate(bags):
        for token, count in bag.items():
            vectors[row, token] = count * np.log(len(bags) / having[token])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return float((vectors[1:] * vectors[:-1]).sum(1).mean())


def text_of(config, tokenizer) -> TokenizedText:
    return load_data(config, tokenizer).train.sources[0].text


def test_every_document_is_there_once_and_beside_its_like(run, tokenizer):
    plain, similar = (load_data(run(order), tokenizer) for order in ("source", "similar"))
    before, after = (data.train.sources[0].text for data in (plain, similar))
    assert documents(before) != documents(after)
    sizes = [Counter(zip(documents(text), text.sizes.tolist())) for text in (before, after)]
    assert sizes[0] == sizes[1]
    assert (before.bytes, before.targets, len(plain.train)) == (after.bytes, after.targets, len(similar.train))
    assert likeness(after) > 2 * likeness(before) > 0
    held_out = [data.validation.sources[0].text for data in (plain, similar)]
    assert documents(held_out[0]) == documents(held_out[1])


def test_the_seed_and_nothing_else_decides(run, tokenizer, tmp_path):
    orders = {seed: documents(text_of(run("similar", seed), tokenizer)) for seed in (0, 1)}
    assert orders[0] != orders[1]
    entries = {path.name for path in (tmp_path / "cache").glob("similar-*") if path.is_dir()}
    assert len(entries) == 2
    assert documents(text_of(run("similar", 1), tokenizer)) == orders[1]
    assert {path.name for path in (tmp_path / "cache").glob("similar-*") if path.is_dir()} == entries
    text = text_of(run("source"), tokenizer)
    assert np.array_equal(*(np.concatenate(list(similar_order(text, 7))) for _ in range(2)))


@pytest.mark.parametrize("portion", [1, 7, 30, 4096])
def test_a_chain_goes_on_from_portion_to_portion(run, tokenizer, portion):
    text = text_of(run("source"), tokenizer)
    parts = list(similar_order(text, 3, portion))
    for i, part in enumerate(parts):
        assert sorted(part) == list(range(i * portion, min((i + 1) * portion, text.documents)))


def test_reading_goes_on_from_any_position(run, tokenizer):
    blocks = load_data(run("similar"), tokenizer).train

    def read(position: int, steps: int) -> list[torch.Tensor]:
        options = {"global_batch_size": 4, "micro_batch_size": 2, "prefetch": 0}
        with TrainLoader(blocks, position=position, **options) as loader:
            return [batch.input_ids_BS for _ in range(steps) for batch in next(loader)]

    straight = read(0, 6)
    again = read(0, 2) + read(8, 4)
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
    assert len(set(zip(*(part.tolist() for part in blocks.locate(0, len(blocks)))))) == len(blocks)


def test_an_empty_document_and_a_single_one_are_ordered_too():
    text = TokenizedText(np.array([1, 2, 1, 5, 5, 2, 1, 2], np.uint16), np.array([0, 2, 6, 8]), np.zeros(3, int), 0)
    assert sorted(np.concatenate(list(similar_order(text, 0)))) == [0, 1, 2]
    single = TokenizedText(text.tokens_N[:2], text.starts[:2], text.sizes[:1], 0)
    assert [part.tolist() for part in similar_order(single, 5)] == [[0]]


def test_chat_has_no_order():
    raw = load_config(QUICKSTART).model_dump(mode="json")
    raw["data"] |= {"order": "similar", "sources": [{"type": "files", "path": "a.jsonl", "content": "chat"}]}
    with pytest.raises(UserError, match=r"data\.order=similar is for documents that follow each other"):
        validate(raw)

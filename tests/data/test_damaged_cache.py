"""A damaged entry of the token cache is named and made again, never trained on."""

import hashlib
import random
import shutil

import numpy as np
import pytest

from moe_llm.config import SourceConfig
from moe_llm.data import cache as cache_module
from moe_llm.data import pieces
from moe_llm.data.shards import cached_tokens
from moe_llm.data.split import HoldOut

FIELD = "data.sources.0"


@pytest.fixture
def source(tmp_path, make_text):
    (tmp_path / "text.txt").write_text(make_text(3, 400), encoding="utf-8")
    return SourceConfig(type="files", path=str(tmp_path / "text.txt"), document="line")


def damage(directory, seed: int) -> str:
    """One fault by a seeded choice; the file that has it."""
    rng = random.Random(seed)
    file = rng.choice(
        sorted(path for path in directory.iterdir() if path.stat().st_size and path.name != "verified.json")
    )
    content = bytearray(file.read_bytes())
    kind = rng.choice(["truncate", "zero", "flip", "remove", "grow", "swap", "largest ids"])
    if kind == "truncate":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "zero":
        file.write_bytes(b"\0" * len(content))
    elif kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "remove":
        file.unlink()
    elif kind == "grow":
        file.write_bytes(content + b"\xff\xff")
    elif kind == "swap":
        other = rng.choice(sorted(path for path in directory.iterdir() if path != file))
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)
    else:
        file.write_bytes(b"\xff" * len(content))
    return file.name


@pytest.mark.parametrize("compared", [1 << 30, 0])
@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 100), marks=pytest.mark.grid)])
def test_damaged_caches_are_named_and_made_again(source, tokenizer, tmp_path, caplog, monkeypatch, compared, seeds):
    monkeypatch.setattr(cache_module, "COMPARED_BYTES", compared)

    def load():
        return cached_tokens(source, FIELD, HoldOut(below=2**62), tokenizer, cache_dir=str(tmp_path / "c"))

    def content(texts) -> list[str]:
        return [
            hashlib.sha256(np.asarray(part).tobytes()).hexdigest()
            for t in texts.values()
            for part in (t.tokens_N, t.starts)
        ]

    expected = content(load())
    [directory] = (tmp_path / "c").glob("tokens-????????????????????????")
    shutil.copytree(directory, tmp_path / "whole")
    for seed in seeds:
        damage(directory, seed)
        differs = any(
            not (directory / path.name).exists() or (directory / path.name).read_bytes() != path.read_bytes()
            for path in (tmp_path / "whole").iterdir()
        )
        caplog.clear()
        assert content(load()) == expected, seed
        named = [record.getMessage() for record in caplog.records if "is damaged: " in record.getMessage()]
        assert bool(named) == differs, seed
        assert not differs or str(directory) in named[0]


@pytest.mark.parametrize("shard_bytes", [1 << 24, 500])
def test_an_entry_of_other_text_under_this_name_is_named_and_made_again(
    source, tokenizer, tmp_path, make_text, caplog, monkeypatch, shard_bytes
):
    """Whole, with checksums that are right: copied by hand, or by a tool that has mixed up directories."""
    monkeypatch.setattr(pieces, "SHARD_BYTES", shard_bytes)
    (tmp_path / "other.txt").write_text(make_text(4, 400), encoding="utf-8")
    other = SourceConfig(type="files", path=str(tmp_path / "other.txt"), document="line")

    def load(source):
        return cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"), num_workers=1)

    expected = load(source)["train"].digest
    [directory] = (tmp_path / "c").glob("tokens-????????????????????????")
    assert load(other)["train"].digest != expected
    [entry] = set((tmp_path / "c").glob("tokens-????????????????????????")) - {directory}
    assert (directory / "00001").is_dir() == (shard_bytes < 1 << 24)
    shutil.rmtree(directory)
    shutil.copytree(entry, directory)
    assert load(source)["train"].digest == expected
    assert f"tokenised data {directory} is damaged: it is {entry.name} under another name" in caplog.text


def test_a_large_entry_is_compared_once_for_each_state_of_its_files(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "COMPARED_BYTES", 0)
    compared = []
    real = cache_module._digest_of
    monkeypatch.setattr(cache_module, "_digest_of", lambda file: compared.append(file) or real(file))
    for _ in range(3):
        cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))
    assert len(compared) == len(set(compared)) > 0


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[1, 2, 3]", b"\0\0\0", b'[1, "x", [], null]', b"[1, 1844674407370955264, [], null]"]
)
def test_a_damaged_split_is_found_anew(tmp_path, source, content):
    from moe_llm.config.load import validate
    from moe_llm.data.split import find_holdout

    raw = {"data": {"sources": [source.model_dump()], "cache_dir": str(tmp_path / "c")}, "train": {"max_steps": 1}}
    config = validate(raw | {"model": {"vocab_size": 64}})
    expected = find_holdout(config)
    [file] = (tmp_path / "c").glob("split-*.json")
    file.write_bytes(content)
    assert find_holdout(config) == expected
    assert find_holdout(config) == expected

"""A build of the token cache that is killed loses at most one portion, and its result is the same to the byte."""

import random

import pytest

from moe_llm.config import SourceConfig
from moe_llm.data import cache as cache_module
from moe_llm.data.portions import JOURNAL
from moe_llm.data.shards import cached_tokens
from moe_llm.data.split import HoldOut

FIELD = "data.sources.0"
PORTION = 4000


class Killed(BaseException):
    """Ends a build as a signal does, wherever it is."""


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    monkeypatch.setattr(cache_module, "_BATCH_BYTES", 500)
    monkeypatch.setattr(cache_module, "_PORTION_BYTES", PORTION)


@pytest.fixture
def source(tmp_path, make_text):
    lines = (make_text(seed, 30).replace("\n", " ") for seed in range(200))
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return SourceConfig(type="files", path=str(tmp_path / "text.txt"), document="line")


def content(root) -> dict[str, bytes]:
    [directory] = [p for p in root.glob("tokens-*") if p.is_dir()]
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def build_killed_after(monkeypatch, documents: int, build) -> int:
    """Documents that were encoded and written before the kill."""
    original, written = cache_module.SplitWriter.write, []

    def write(self, tokens, size):
        if len(written) == documents:
            raise Killed
        original(self, tokens, size)
        written.append(size)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.SplitWriter, "write", write)
        with pytest.raises(Killed):
            build()
    return len(written)


def test_twenty_kills_leave_the_bytes_of_an_undisturbed_build(source, tokenizer, tmp_path, monkeypatch):
    def build(root):
        return cached_tokens(source, FIELD, HoldOut(below=2**62), tokenizer, cache_dir=str(tmp_path / root))

    build("whole")
    expected = content(tmp_path / "whole")
    for seed in range(20):
        rng, root = random.Random(seed), f"killed{seed}"
        for _ in range(rng.randrange(1, 4)):
            build_killed_after(monkeypatch, rng.randrange(1, 60), lambda root=root: build(root))
        build(root)
        assert content(tmp_path / root) == expected
        assert not list((tmp_path / root).glob(".tokens-*")), "nothing unfinished remains"


def test_a_kill_costs_at_most_one_portion(source, tokenizer, tmp_path, monkeypatch):
    def build():
        return cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / "c"))

    build_killed_after(monkeypatch, 120, build)
    sizes = []
    original = cache_module.SplitWriter.write
    monkeypatch.setattr(
        cache_module.SplitWriter, "write", lambda self, t, size: (sizes.append(size), original(self, t, size))
    )
    texts = build()
    read_again = len(sizes) - (texts["train"].documents - 120)
    assert len(sizes) < texts["train"].documents, "what was finished is not encoded again"
    assert 0 <= read_again <= 120
    assert sum(sizes[:read_again]) <= PORTION + 1000, "a portion and a batch"


@pytest.mark.parametrize("fault", ["torn journal", "damaged portion", "short file", "no journal"])
def test_a_damaged_unfinished_build_is_cut_back_to_what_is_whole(source, tokenizer, tmp_path, monkeypatch, fault):
    def build(root):
        return cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / root))

    build("whole")
    build_killed_after(monkeypatch, 150, lambda: build("c"))
    [unfinished] = (tmp_path / "c").glob(".tokens-*.unfinished")
    tokens, journal = unfinished / "train.tokens.bin", unfinished / JOURNAL
    if fault == "torn journal":
        journal.write_bytes(journal.read_bytes()[:-40])
    elif fault == "damaged portion":
        data = bytearray(tokens.read_bytes())
        data[len(data) // 3] ^= 4
        tokens.write_bytes(data)
    elif fault == "short file":
        tokens.write_bytes(tokens.read_bytes()[:2000])
    else:
        journal.unlink()
    build("c")
    assert content(tmp_path / "c") == content(tmp_path / "whole")


def test_an_unfinished_build_of_other_text_is_not_used(source, tokenizer, tmp_path, monkeypatch):
    def build(root):
        return cached_tokens(source, FIELD, HoldOut(), tokenizer, cache_dir=str(tmp_path / root))

    build_killed_after(monkeypatch, 150, lambda: build("c"))
    text = tmp_path / "text.txt"
    text.write_text("another first line\n" + text.read_text(encoding="utf-8"), encoding="utf-8")
    build("whole")
    build("c")
    assert content(tmp_path / "c") == content(tmp_path / "whole")

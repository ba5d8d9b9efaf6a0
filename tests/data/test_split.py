"""The held-out text never occurs in training, is about as large as asked, and is never empty."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_llm.data.sources import named_sources
from moe_llm.data.split import HoldOut, choose_holdout, find_holdout, text_hash, training_texts
from moe_llm.errors import UserError


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=40), st.floats(0.005, 0.6))
@example(["0", "\U00010000"], 0.5)  # of one character each, the larger one above the target by itself
@example(["\U00010000", "\U00010001"], 0.3)
def test_every_corpus_is_divided_without_loss_or_leak(documents, fraction):
    if len(set(documents)) == 1 and len(documents[0]) == 1:
        return
    holdout = choose_holdout(documents, fraction)
    parts = [holdout.divide(d) for d in documents]
    assert [train + held for train, held in parts] == documents
    assert any(train for train, _ in parts)
    assert any(held for _, held in parts)
    whole_train = {train for train, held in parts if not held}
    whole_held = {held for train, held in parts if not train}
    assert not whole_train & whole_held


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3])
def test_size_of_the_held_out_part(make_text, fraction):
    for documents in (
        ["line of text\n" * 2000],
        [make_text(i, 5 + i % 200) for i in range(700)],
        [make_text(1, 4000), "tiny", "also tiny"],
    ):
        holdout = choose_holdout(documents, fraction)
        held = sum(len(holdout.divide(d)[1].encode()) for d in documents)
        assert fraction / 2.5 < held / sum(len(d.encode()) for d in documents) < 2 * fraction


def test_large_corpus_is_divided_by_hash_and_read_only_in_part():
    read = itertools.count()

    def endless():
        while True:
            yield f"document {next(read)}"

    holdout = choose_holdout(endless(), 0.1)
    assert holdout == HoldOut(below=int(0.1 * 2**64))
    assert next(read) < 1000
    held = sum(bool(holdout.divide(f"text {i}")[1]) for i in range(20_000))
    assert 1800 < held < 2200


def test_one_document_is_cut_at_a_line_start():
    text = "".join(f"line {i} with some words\n" for i in range(5000))
    holdout = choose_holdout([text, text], 0.02)
    train, held = holdout.divide(text)
    assert train + held == text
    assert train.endswith("\n")
    assert 0.01 < len(held) / len(text) <= 0.02
    assert holdout.divide("another text") == ("another text", "")


def test_one_character_cannot_be_divided():
    with pytest.raises(UserError, match=r"one document of one character.*data\.validation_sources"):
        choose_holdout(["x"], 0.1)


def test_the_decision_is_remembered_and_follows_the_text(tmp_path, make_config, make_text):
    path = tmp_path / "a.jsonl"
    source = {"type": "files", "path": str(tmp_path / "*.txt")}
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(make_text(i))
    config = make_config([source], data={"sources": [source], "validation_fraction": 0.1})
    first = find_holdout(config)
    assert find_holdout(config) == first
    assert len(list((tmp_path / "cache").glob("split-*.json"))) == 1
    listed = next(iter(first.listed))
    changed = next(p for p in tmp_path.glob("*.txt") if text_hash(p.read_text()) == listed)
    changed.write_text("something else")
    assert listed not in find_holdout(config).listed
    assert not path.exists()


def test_training_leaves_out_what_validation_sources_hold(tmp_path, make_config):
    (tmp_path / "train.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "held.txt").write_text("two\nfour\n")
    train, held = (
        {"type": "files", "path": str(tmp_path / f"{name}.txt"), "document": "line"} for name in ("train", "held")
    )
    config = make_config([train], data={"sources": [train], "validation_sources": [held]})
    ((field, source),) = named_sources(config)
    assert list(training_texts(field, source, find_holdout(config))) == ["one", "three"]

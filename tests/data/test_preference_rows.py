"""Rows of preferences become pairs of documents whose answers alone are targets, whatever shape they have."""

import json

import numpy as np
import pytest

from moe_llm.config import SourceConfig
from moe_llm.data.cache import TokenizedText
from moe_llm.data.pairs import PackedPairs
from moe_llm.data.preference import read_pairs
from moe_llm.errors import UserError

USER = {"role": "user", "content": "q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))


@pytest.fixture
def read(tmp_path):
    def of(*rows: dict):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return list(read_pairs(SourceConfig(type="files", path=str(path), content="preference"), "data.sources.0"))

    return of


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_conversations_in_every_shape_are_the_same_pair(read, row):
    [pair] = read(row)
    assert [side.messages for side in pair] == [[USER, GOOD], [USER, BAD]]
    assert all(side.learned() == [1] for side in pair)


def test_turns_that_both_conversations_share_are_read_and_not_learned(read):
    before = [USER, GOOD, USER]
    [pair] = read({"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert [side.learned() for side in pair] == [[3], [3]]


def test_text_goes_on_behind_its_prompt_or_behind_what_both_begin_with(read):
    pairs = read({"prompt": "ab", "chosen": "cd", "rejected": "e"}, {"chosen": "abcd", "rejected": "abe"})
    assert [(side.prompt, side.answer) for pair in pairs for side in pair] == [("ab", "cd"), ("ab", "e")] * 2


def test_equal_answers_and_weightless_rows_are_left_out(read, caplog):
    kept = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert len(read(kept, {**kept, "rejected": "b"}, {**kept, "weight": 0})) == 1
    assert "1 rows whose chosen and rejected answers are the same" in caplog.text


def test_rows_that_are_all_ties_are_refused_by_what_they_lack(read):
    with pytest.raises(UserError, match=r"holds no pairs to learn from.*chosen and rejected answers differ"):
        read({"prompt": "a", "chosen": "b", "rejected": "b"})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no rejected answer"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt is no text and no list"),
        ({"chosen": [USER, GOOD], "rejected": [USER, USER]}, "has no turn of the assistant"),
    ],
)
def test_broken_rows_are_named(read, row, why):
    with pytest.raises(UserError, match=why):
        read(row)


def packed(lengths: list[tuple[int, int]], length: int, overlong: str = "drop") -> PackedPairs:
    flat = [n for pair in lengths for n in pair]
    starts = np.cumsum([0, *(n + 1 for n in flat)])
    targets = np.concatenate([[0, *([0] * (n - 1)), 1] if n < 6 else [0, 0, *([1] * (n - 1))] for n in flat])
    ids = np.concatenate([np.full(n + 1, d) for d, n in enumerate(flat)])
    text = TokenizedText(ids, starts, np.ones(len(flat), int), len(flat), targets.astype(np.uint8))
    return PackedPairs(text, length, overlong, pad=99)


def test_both_answers_of_a_pair_share_a_block_in_their_order_with_their_references():
    blocks = packed([(3, 4), (2, 2), (5, 3), (1, 2)], length=11)
    blocks.reference = -np.arange(8, dtype=np.float32) - 1
    seen = []
    for block in range(len(blocks)):
        arrays = blocks.empty_arrays(1)
        blocks.write(block, 0, arrays)
        documents, ids = arrays["document_ids_BS"][0], arrays["input_ids_BS"][0]
        for d in range(0, documents.max() + 1, 2):
            chosen, rejected = (int(ids[documents == i][0]) for i in (d, d + 1))
            assert (chosen % 2, rejected) == (0, chosen + 1)
            for document, source in ((d, chosen), (d + 1, rejected)):
                assert arrays["reference_BS"][0, documents == document].tolist()[0] == -source - 1
                assert (arrays["reference_BS"][0, documents == document][1:] == 0).all()
            seen.append(chosen // 2)
    assert sorted(seen) == [0, 1, 2, 3]


def test_overlong_pairs_are_dropped_or_cut_to_where_both_fit():
    assert (packed([(9, 4), (2, 2)], 10).dropped, packed([(9, 4), (2, 2)], 10).kept) == (1, 1)
    cut = packed([(9, 4), (2, 2)], 10, "truncate")
    assert (cut.dropped, cut.truncated, cut.kept) == (0, 1, 2)
    assert cut.places == 10 + 4, "the longer answer alone is cut"
    cut = packed([(9, 7), (2, 2)], 10, "truncate")
    assert (cut.dropped, cut.truncated) == (0, 1)
    arrays = cut.empty_arrays(1)
    cut.write(0, 0, arrays)
    assert (arrays["document_ids_BS"][0] == 0).sum() == (arrays["document_ids_BS"][0] == 1).sum() == 5

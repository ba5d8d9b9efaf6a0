"""Best-fit packing cuts no document that fits a block, predicts every token once, and reports cuts and padding."""

import random

import numpy as np
import pytest

from moe_llm.data.best_fit import PackedDocuments
from moe_llm.data.loader import load_data
from moe_llm.data.packing import IGNORED, as_batch

S = 32


@pytest.fixture(params=range(4))
def both(request, random_blocks):
    rng = random.Random(request.param)
    concat = random_blocks([rng.choice([1, 3, 9, 20, 30, 31, 90]) for _ in range(60)], S)
    return concat, PackedDocuments(concat.text, S, pad=2)


def batch_of(blocks):
    arrays = blocks.empty_arrays(len(blocks))
    for block in range(len(blocks)):
        blocks.write(block, block, arrays)
    return as_batch(arrays)


def test_every_token_but_a_documents_first_is_predicted_once_from_the_token_before(both):
    concat, packed = both
    batch = batch_of(packed)
    mask = batch.attention_mask_BS
    learned = batch.labels_BS != IGNORED
    assert (learned == (mask & (batch.input_ids_BS != 2))).all(), "a document's end and padding predict nothing"
    found = sorted(zip(batch.input_ids_BS[learned].tolist(), batch.labels_BS[learned].tolist()))
    tokens, starts = concat.text.tokens_N.tolist(), set(concat.text.starts.tolist())
    assert found == sorted((tokens[i - 1], tokens[i]) for i in range(1, len(tokens)) if i not in starts)
    assert batch.num_targets == packed.targets
    assert batch.num_tokens == packed.places


def test_only_documents_longer_than_a_block_are_cut(both):
    concat, packed = both
    longer = int((np.diff(concat.text.starts) - 1 > S).sum())
    assert packed.cut_documents == longer
    assert concat.cut_documents > longer, "concat cuts others too"


def test_cut_documents_of_concat_are_those_that_stand_in_two_blocks(both):
    concat, _ = both
    starts = concat.text.starts
    seen = [{(t - 1) // S for t in range(starts[d] + 1, starts[d + 1])} for d in range(concat.text.documents)]
    assert concat.cut_documents == sum(len(blocks) > 1 for blocks in seen)


def test_documents_of_a_block_do_not_see_each_other_and_padding_comes_last(both):
    _, packed = both
    batch = batch_of(packed)
    for row in range(len(packed)):
        documents = batch.document_ids_BS[row].tolist()
        n = int(batch.attention_mask_BS[row].sum())
        assert documents[:n] == sorted(documents[:n])
        assert set(documents[n:]) <= {-1}
        for document in set(documents[:n]):
            positions = batch.position_ids_BS[row][batch.document_ids_BS[row] == document]
            assert positions.tolist() == list(range(len(positions)))


def test_padding_and_bytes_are_those_of_the_blocks(both):
    _, packed = both
    assert packed.padding == pytest.approx(1 - float(batch_of(packed).attention_mask_BS.float().mean()), abs=1e-6)
    assert packed.padding < 0.1
    assert sum(packed.bytes_of(block) for block in range(len(packed))) == pytest.approx(packed.bytes)


def test_a_run_reads_what_packing_says_and_reports_it(tmp_path, make_text, make_config, tokenizer):
    (tmp_path / "x.txt").write_text("".join(make_text(i, 5 + i % 9) for i in range(80)), encoding="utf-8")
    source = {"type": "files", "path": str(tmp_path / "x.txt"), "document": "line"}
    share = {}
    for packing in ("concat", "best_fit"):
        config = make_config([source], data={"packing": packing, "sequence_length": 64})
        data = load_data(config, tokenizer, show_progress=False)
        [part] = [part for part in data.statistics if part.split == "train"]
        assert part.padding == pytest.approx(1 - data.train.fill)
        share[packing] = part.cut / part.documents
    assert share["best_fit"] < share["concat"]


@pytest.mark.parametrize("other", [{"isolate_documents": False}, {"order": "similar"}])
def test_settings_that_best_fit_would_undo_are_refused(make_config, other):
    with pytest.raises(ValueError, match="packs by length"):
        make_config([{"type": "files", "path": "x"}], data={"packing": "best_fit", **other})

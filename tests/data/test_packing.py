"""Over the blocks of a source every token but the first of each document is a target exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_llm.data.packing import IGNORED, Batch, as_batch

LENGTHS = st.lists(st.integers(1, 25), min_size=1, max_size=12)


def all_rows(blocks) -> Batch:
    arrays = blocks.empty_arrays(len(blocks))
    for i in range(len(blocks)):
        blocks.write(i, i, arrays)
    return as_batch(arrays)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 24), st.booleans())
def test_nothing_lost_and_nothing_repeated(random_blocks, lengths, sequence_length, isolate):
    blocks = random_blocks(lengths, sequence_length, isolate)
    batch = all_rows(blocks)
    tokens, starts = blocks.text.tokens_N, blocks.text.starts
    not_first = np.ones(len(tokens), bool)
    not_first[starts[:-1]] = False
    targets = batch.labels_BS[batch.labels_BS != IGNORED]
    assert targets.tolist() == tokens[not_first].tolist()
    assert batch.num_targets == blocks.text.targets == int(not_first.sum())
    assert batch.input_ids_BS[batch.attention_mask_BS].tolist() == tokens[:-1].tolist()
    assert batch.num_tokens == len(tokens) - 1
    padding = ~batch.attention_mask_BS
    assert (batch.labels_BS[padding] == IGNORED).all()
    assert (batch.input_ids_BS[padding] == 2).all()
    assert not padding[:-1].any()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 24))
def test_targets_are_the_next_token_of_the_same_document(random_blocks, lengths, sequence_length):
    batch = all_rows(random_blocks(lengths, sequence_length))
    ids, labels, documents = batch.input_ids_BS, batch.labels_BS, batch.document_ids_BS
    same = (documents[:, 1:] == documents[:, :-1]) & batch.attention_mask_BS[:, 1:]
    assert (labels[:, :-1][same] == ids[:, 1:][same]).all()
    new = (documents[:, 1:] != documents[:, :-1]) & batch.attention_mask_BS[:, 1:]
    assert (labels[:, :-1][new] == IGNORED).all()
    assert (ids[:, 1:][new] == 1).all()
    assert (ids[:, :-1][new] == 2).all()
    assert (labels != 1).all(), "bos is never a target"


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 24))
def test_positions_restart_with_each_document(random_blocks, lengths, sequence_length):
    batch = all_rows(random_blocks(lengths, sequence_length))
    for documents, positions, mask in zip(batch.document_ids_BS, batch.position_ids_BS, batch.attention_mask_BS):
        seen = {}
        for document, position, real in zip(documents.tolist(), positions.tolist(), mask.tolist()):
            assert (document == -1) == (not real)
            if real:
                assert position == seen.get(document, 0)
                seen[document] = position + 1
        assert list(seen) == list(range(len(seen)))


def test_without_isolation_positions_span_the_block(random_blocks):
    batch = all_rows(random_blocks([3, 4, 5], 8, isolate=False))
    assert batch.document_ids_BS is None
    assert (batch.position_ids_BS == torch.arange(8)).all()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 24))
def test_bytes_of_blocks_add_up(random_blocks, lengths, sequence_length):
    blocks = random_blocks(lengths, sequence_length)
    assert sum(blocks.bytes_of(i) for i in range(len(blocks))) == pytest.approx(3 * sum(lengths))


def test_a_batch_moves_whole_and_in_parts(random_blocks):
    batch = all_rows(random_blocks([30, 40], 8))
    part = batch.rows(1, 3).to("cpu")
    assert part.input_ids_BS.tolist() == batch.input_ids_BS[1:3].tolist()
    assert part.document_ids_BS.shape == (2, 8)
    dtypes = [
        batch.input_ids_BS.dtype,
        batch.labels_BS.dtype,
        batch.position_ids_BS.dtype,
        batch.document_ids_BS.dtype,
        batch.attention_mask_BS.dtype,
    ]
    assert dtypes == [torch.int64] * 4 + [torch.bool]
    loose = all_rows(random_blocks([30], 8, isolate=False)).to("meta")
    assert loose.labels_BS.is_meta
    assert loose.document_ids_BS is None

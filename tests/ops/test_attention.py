"""The pattern says who sees whom, and attention under it equals softmax written out."""

import pytest
import torch

from moe_llm.ops import reference
from moe_llm.ops.attention import AttentionPattern, attention

BATCH, LENGTH = 2, 13
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5 + [2] * 4, [5] * 13])
# a document that comes back after another one
SPLIT_DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5 + [0] * 4, [1] * 2 + [0] * 11])
RIGHT_PADDED = torch.tensor([[1] * 9 + [0] * 4, [1] * 13])
LEFT_PADDED = torch.tensor([[0] * 4 + [1] * 9, [0] * 12 + [1]])
HOLES = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1], [0] * 13])

PATTERNS = {
    "causal": {},
    "window": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "window as long as the sequence": {"sliding_window": LENGTH},
    "documents": {"document_ids": DOCUMENTS},
    "documents that come back": {"document_ids": SPLIT_DOCUMENTS},
    "documents and window": {"document_ids": DOCUMENTS, "sliding_window": 3},
    "no padding": {"attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64)},
    "right padding": {"attention_mask": RIGHT_PADDED},
    "left padding": {"attention_mask": LEFT_PADDED},
    "holes": {"attention_mask": HOLES},
    "all": {"attention_mask": RIGHT_PADDED, "document_ids": DOCUMENTS, "sliding_window": 3},
}


def make_inputs(dtype, heads=6, groups=2, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, LENGTH, n, head_dim) for n in (heads, groups, groups)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [x_BSHd.transpose(1, 2).requires_grad_() for x_BSHd in inputs]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_equals_reference(pattern, groups, dtype, tolerance):
    """On the rows of real tokens; padding only has to be finite."""
    inputs = make_inputs(dtype, groups=groups)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    y = attention(*inputs, pattern=AttentionPattern.build(ids, **pattern))
    real = pattern.get("attention_mask", torch.ones_like(ids)).bool()
    keys = ("attention_mask", "document_ids", "sliding_window")
    sees = reference.attention_mask((BATCH, LENGTH), *map(pattern.get, keys))
    expected = reference.attention(*inputs, sees)
    real_rows = real[:, None, :, None].expand_as(y)
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert (y - expected)[real_rows].abs().max() <= tolerance * expected.abs().max()

    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype) * real_rows
    grads = torch.autograd.grad(y, inputs, direction)
    for grad, other in zip(grads, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert grad.isfinite().all()
        # where a query sees one key, the true gradient of its score is zero: hence an absolute part
        assert (grad - other).abs().max() <= 2 * tolerance * max(1, other.abs().max())


@pytest.mark.parametrize("mask", [RIGHT_PADDED, LEFT_PADDED, HOLES])
def test_padding_is_seen_by_nobody(mask):
    pattern = AttentionPattern.build(mask, attention_mask=mask)
    q, k, v = make_inputs(torch.float32)
    y = attention(q, k, v, pattern=pattern)
    padding = (mask == 0)[:, None, :, None]
    other = attention(q, torch.where(padding, 1e3 * k, k), torch.where(padding, v + 7, v), pattern=pattern)
    real_rows = ~padding.expand_as(y)
    assert torch.equal(y[real_rows], other[real_rows])
    grad_k, grad_v = torch.autograd.grad((y * real_rows).square().sum(), (k, v))
    assert (grad_k.where(padding, 0.0) == 0).all()
    assert (grad_v.where(padding, 0.0) == 0).all()


def test_every_query_of_a_mask_sees_at_least_itself():
    """Not every kernel gives zero for a query that sees nothing."""
    mask_B1SS = AttentionPattern.build(HOLES, attention_mask=HOLES, sliding_window=3).mask_B1SS
    assert mask_B1SS.diagonal(dim1=-2, dim2=-1).all()
    assert mask_B1SS[1, 0].sum() == LENGTH  # nothing but padding: nothing but themselves


def test_gradients_of_padding_rows_are_finite():
    """Even if the loss reads them, and even for a sequence of nothing but padding."""
    inputs = make_inputs(torch.float32)
    y = attention(*inputs, pattern=AttentionPattern.build(HOLES, attention_mask=HOLES))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.square().sum(), inputs))


@pytest.mark.parametrize(
    "pattern",
    [
        {},
        {"sliding_window": LENGTH},
        {"attention_mask": torch.ones(BATCH, LENGTH)},
        {"document_ids": torch.tensor([[3] * LENGTH, [4] * LENGTH])},
    ],
)
def test_patterns_that_hide_nothing_are_plain_causal(pattern):
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    assert AttentionPattern.build(ids, **pattern).mask_B1SS is None


def test_documents_in_one_row_equal_documents_alone():
    inputs = make_inputs(torch.float32)
    y = attention(*inputs, pattern=AttentionPattern.build(DOCUMENTS, document_ids=DOCUMENTS))
    for start, end in ((0, 4), (4, 9), (9, 13)):
        alone = [tensor[:1, :, start:end] for tensor in inputs]
        expected = attention(*alone, pattern=AttentionPattern.build(DOCUMENTS[:1, start:end]))
        torch.testing.assert_close(y[:1, :, start:end], expected)


SEGMENTS = {
    "documents": (4, 5, 4, 13),
    "documents that come back": None,
    "documents and window": None,
    "right padding": (9, 4, 13),
    "left padding": (4, 9, 12, 1),
    "holes": None,
    "window": None,
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_runs_become_segments_and_all_else_a_mask(name):
    pattern = AttentionPattern.build(torch.zeros(BATCH, LENGTH), **PATTERNS[name])
    assert pattern.segments == SEGMENTS[name]
    assert (pattern.mask_B1SS is None) == (pattern.segments is not None)


def test_a_window_beyond_every_document_leaves_segments():
    documents = DOCUMENTS[:1]
    ids = torch.zeros(1, LENGTH)
    assert AttentionPattern.build(ids, document_ids=documents, sliding_window=5).segments == (4, 5, 4)
    assert AttentionPattern.build(ids, document_ids=documents, sliding_window=4).segments is None


def test_segments_equal_the_mask():
    """On the real tokens' rows; of padding rows both are finite, but they see different padding."""
    inputs = make_inputs(torch.float32)
    options = {"attention_mask": RIGHT_PADDED, "document_ids": DOCUMENTS}
    segments = AttentionPattern.build(RIGHT_PADDED, **options)
    assert segments.segments == (4, 5, 4, 13)
    mask = reference.attention_mask((BATCH, LENGTH), *options.values()) | torch.eye(LENGTH, dtype=torch.bool)
    y = attention(*inputs, pattern=segments)
    expected = attention(*inputs, pattern=AttentionPattern(mask[:, None]))
    real = RIGHT_PADDED.bool()[:, None, :, None]
    torch.testing.assert_close(y * real, expected * real)
    assert y.transpose(1, 2).is_contiguous()

"""Capacity: who gets a place, what happens to the rest, and that the layout of ranks does not matter."""

import pytest
import torch

from moe_llm.config import ModelConfig
from moe_llm.model.init import build_model
from moe_llm.model.moe.capacity import Groups, assign_by_choice, assign_by_position, capacity_of


def greedy(
    preference: list[list[int]], real: list[bool], top_k: int, experts: int, capacity: int, order: str
) -> list[list[bool]]:
    """One sequence, in the words of the docstrings: token by token, or choice by choice."""
    used, held = [0] * experts, [0] * len(preference)
    granted = [[False] * len(row) for row in preference]
    choices, positions = range(len(preference[0])), range(len(preference))
    turns = [(s, r) for s in positions for r in choices]
    if order == "choice":
        turns = [(s, r) for r in choices for s in positions]
    for position, choice in turns:
        expert = preference[position][choice]
        if real[position] and held[position] < top_k and used[expert] < capacity:
            used[expert] += 1
            held[position] += 1
            granted[position][choice] = True
    return granted


SERVE = {"position": assign_by_position, "choice": assign_by_choice}


@pytest.mark.parametrize("order", SERVE)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("proposals", "top_k"), [(2, 2), (5, 2), (1, 1), (5, 1), (4, 3)])
def test_assignment_equals_the_greedy_one_in_each_document(seed, proposals, top_k, order):
    experts, documents = 5, (3, 7, 1, 11)
    length = sum(documents)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.tensor([2.0, 1.0, 0, 0, -1])
    preference = (torch.randn(3, length, experts, generator=generator) + bias).topk(proposals).indices
    real = torch.rand(3, length, generator=generator) > 0.2
    number = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).expand(3, -1)
    for factor in (0.3, 0.8, 1.3, 5.0):
        groups = Groups.of(real, number)
        found = SERVE[order](preference, groups, top_k, experts, groups.capacity(factor, top_k, experts))
        for row in range(3):
            begin = 0
            for size in documents:
                part = slice(begin, begin + size)
                room = capacity_of(factor, int(real[row, part].sum()), top_k, experts)
                args = preference[row, part].tolist(), real[row, part].tolist(), top_k, experts, room, order
                assert found[row, part].tolist() == greedy(*args)
                begin += size


@pytest.mark.parametrize("tokens", [1, 5])
def test_of_factors_beyond_measure_the_small_leave_room_for_one_and_the_large_for_all(tokens):
    groups = Groups.of(torch.ones(1, tokens, dtype=torch.bool))
    assert groups.capacity(1e-300, 2, 4).tolist() == [[1] * tokens]
    assert groups.capacity(1e300, 2, 4).tolist() == [[tokens] * tokens]


def test_capacity_is_the_even_share_times_the_factor():
    assert capacity_of(1.0, 64, 2, 8) == 16
    assert capacity_of(1.25, 64, 2, 8) == 20
    assert capacity_of(0.01, 64, 2, 8) == 1


def model_of(**router):
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        router=router,
    )
    return build_model(config, 0)


TOKENS = torch.randint(0, 50, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("overflow", ["drop", "next", "residual"])
def test_ample_capacity_changes_nothing(overflow):
    free, limited = model_of(), model_of(capacity_factor=4.0, overflow=overflow)
    a, b = free(TOKENS, labels=TOKENS), limited(TOKENS, labels=TOKENS)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(free.named_parameters(), limited.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert b.routing.dropped.sum() == 0


def test_tight_capacity_drops_and_passing_on_drops_less():
    dropped = {}
    for overflow in ("drop", "next"):
        model = model_of(capacity_factor=1.0, overflow=overflow)
        counts = []
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_hook(lambda m, args, out, seen=counts: seen.append(args[1]))
        output = model(TOKENS, labels=TOKENS)
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        bound = capacity_of(1.0, TOKENS.shape[1], 2, 4) * len(TOKENS)
        for layer, rows in enumerate(counts):
            assert rows.max() <= bound
            assert rows.sum() + output.routing.dropped[layer] == TOKENS.numel() * 2
        dropped[overflow] = output.routing.dropped.sum().item()
    assert dropped["drop"] > 0
    assert dropped["next"] < dropped["drop"]


def test_evaluation_drops_nothing_as_the_exported_model():
    free, limited = model_of().eval(), model_of(capacity_factor=0.5).eval()
    assert torch.equal(free(TOKENS).logits, limited(TOKENS).logits)


@pytest.mark.parametrize("overflow", ["drop", "next", "residual"])
def test_a_sequence_is_treated_the_same_in_any_batch(overflow):
    model = model_of(capacity_factor=0.8, overflow=overflow)
    together = model(TOKENS).logits
    for i in range(len(TOKENS)):
        torch.testing.assert_close(model(TOKENS[i : i + 1]).logits[0], together[i], rtol=1e-5, atol=1e-5)


def test_padding_takes_no_place():
    model = model_of(capacity_factor=0.8)
    mask = torch.ones(4, 24)
    mask[:, :12] = 0
    statistics = model(TOKENS, attention_mask=mask).routing
    assert statistics.num_tokens.tolist() == [48.0, 48.0]
    assert (statistics.dropped <= 48 * 2).all()


@pytest.mark.parametrize("overflow", ["drop", "next", "residual"])
def test_recomputation_drops_the_same(overflow):
    results = []
    for recompute in (False, True):
        model = model_of(capacity_factor=0.8, overflow=overflow)
        model.model.recompute = recompute
        output = model(TOKENS, labels=TOKENS)
        output.loss.backward()
        results.append((output.loss.detach(), [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

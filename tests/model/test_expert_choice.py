"""What experts that choose their tokens promise: even loads, no padding, and thresholds that stand for the choice."""

import pytest
import torch
from test_routers import by_definition, config_of, inputs, layer_of

from moe_llm.model.moe.experts import MoELayer
from moe_llm.model.moe.routers import ROUTERS

E, K = 6, 2


def blank(**settings) -> MoELayer:
    """With thresholds as they begin."""
    layer = layer_of(config_of("expert_choice", K, settings))
    layer.gate.threshold.zero_()
    return layer


def test_every_expert_takes_the_same_number_of_each_sequence():
    layer = blank()
    x_BSD = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(0))
    statistics = layer(x_BSD, torch.ones(4, 12, dtype=torch.bool))[1]
    assert statistics.tokens_per_expert_E.tolist() == [4 * 12 * K / E] * E


def test_padding_is_taken_by_none_and_changes_nothing():
    layer, (x_BSD, mask_BS) = blank(), inputs()
    other_BSD = torch.where(mask_BS[..., None], x_BSD, 5 * torch.randn_like(x_BSD))
    (y_BSD, found), (again_BSD, other) = layer(x_BSD, mask_BS), layer(other_BSD, mask_BS)
    assert torch.equal(y_BSD[mask_BS], again_BSD[mask_BS])
    assert not y_BSD[~mask_BS].any()
    assert torch.equal(found.extra_X, other.extra_X)


def test_before_the_first_step_every_token_has_every_expert():
    layer, (x_BSD, mask_BS) = blank().eval(), inputs()
    x_TD = x_BSD.flatten(0, 1)
    expected_TD = by_definition(x_TD, layer, (x_TD @ layer.gate.weight.T).softmax(-1))
    torch.testing.assert_close(layer(x_BSD, mask_BS)[0].flatten(0, 1), expected_TD, rtol=1e-5, atol=1e-5)


def test_the_threshold_is_a_running_mean_of_the_lowest_score_taken():
    layer, (x_BSD, mask_BS) = blank(threshold_rate=0.25), inputs()
    mask_BS[2] = False  # a sequence of nothing says nothing
    score_BSE = (x_BSD @ layer.gate.weight.T).softmax(-1)
    lowest = []
    for b, length in ((0, 10), (1, 7)):
        lowest.append(score_BSE[b, :length].topk(-(-length * K // E), dim=0).values[-1])
    mean_E = torch.stack(lowest).mean(0)
    layer.gate.after_step(layer(x_BSD, mask_BS)[1])
    torch.testing.assert_close(layer.gate.threshold, mean_E)
    layer.gate.threshold.fill_(0.6)
    layer.gate.after_step(layer(x_BSD, mask_BS)[1])
    torch.testing.assert_close(layer.gate.threshold, 0.75 * 0.6 + 0.25 * mean_E)


def test_a_short_sequence_gives_a_share_of_its_own_tokens():
    layer, (x_BSD, mask_BS) = blank(), inputs()
    mask_BS[:, 2:] = False  # 3 sequences of 2 tokens: of each an expert takes 2 * K / E, rounded up
    assert layer(x_BSD, mask_BS)[1].tokens_per_expert_E.tolist() == [3.0] * E


def test_thresholds_give_about_as_many_experts_as_the_choice_did():
    layer = blank()
    generator = torch.Generator().manual_seed(1)
    mask_BS = torch.ones(16, 60, dtype=torch.bool)
    for _ in range(30):
        layer.gate.after_step(layer(torch.randn(16, 60, 12, generator=generator), mask_BS)[1])
    statistics = layer.eval()(torch.randn(16, 60, 12, generator=generator), mask_BS)[1]
    assert statistics.tokens_per_expert_E.sum().item() / mask_BS.sum() == pytest.approx(K, rel=0.05)
    assert (statistics.tokens_per_expert_E / mask_BS.sum() * E / K - 1).abs().max() < 0.15


def test_active_experts_are_the_average():
    assert config_of("expert_choice", 2, {}).router.active_experts(config_of("expert_choice", 2, {})) == 2
    half = config_of("expert_choice", 2, {"capacity_factor": 0.7})
    assert half.router.active_experts(half) == 2
    assert not ROUTERS["expert_choice"].Settings.causal


def test_tokens_that_are_alike_but_for_rounding_come_in_their_order():
    """A token that is repeated at the start of a text has the same hidden state each time."""
    layer = blank()
    x_BSD = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(3)).repeat(1, 12, 1)
    x_BSD = x_BSD * (1 + 1e-7 * torch.randn(1, 12, 1, generator=torch.Generator().manual_seed(4)))
    routing = layer.gate(x_BSD, torch.ones(1, 12, dtype=torch.bool))
    assert routing.token_index_N.view(E, -1).tolist() == [[0, 1, 2, 3]] * E

"""A step's loss is one number, with one gradient, however its rows are split over ranks.

Dimensions: B rows, S sequence, E experts.
"""

import pytest
import torch
from support.training import config, rows

from moe_llm.data.packing import model_inputs
from moe_llm.distributed.step_loss import StepLoss, sum_over_ranks
from moe_llm.model.init import build_model

ROWS = 6
SPLITS = [[6], [3, 3], [1, 5], [4, 2], [2, 2, 2], [1, 2, 3], [1] * 6]


class Split:
    """Stands in for the runtime of one of several ranks: `sum` gives what they would have agreed on, in turn."""

    def __init__(self, world_size: int, replies: list[torch.Tensor]):
        self.world_size, self._replies = world_size, list(replies)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        reply = self._replies.pop(0)
        assert tensor.shape == reply.shape
        return reply.clone()


def flat(statistics) -> torch.Tensor:
    return torch.cat([part.detach().flatten() for part in statistics])


def step_of(split: list[int], rounds: int = 1, scope: str = "global", alike: bool = False, **model_settings):
    """(total, lm, aux, z, distill) of a step as the engine averages them over the ranks, all gradients, all counts."""
    cfg = config(1, 1, 1, model={"router_aux_loss_scope": scope, **model_settings})
    model = build_model(cfg.model, seed=3)
    for name, parameter in model.named_parameters():
        if not parameter.any():  # routers that begin at zero would show little
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    whole = rows(0, 0, ROWS)
    if alike:  # the second half is the first once more
        parts = (whole.input_ids_BS, whole.labels_BS, whole.attention_mask_BS)  # positions are the same anyway
        for part in parts:
            part[ROWS // 2 :] = part[: ROWS // 2].clone()
    size, starts = ROWS // rounds, [sum(split[:i]) for i in range(len(split))]
    batches = [[whole.rows(j * size + s, j * size + s + n) for j in range(rounds)] for s, n in zip(starts, split)]
    outputs = [[model(**model_inputs(batch)) for batch in mine] for mine in batches]
    real = whole.attention_mask_BS
    counts = torch.tensor([float(whole.num_targets), float(real.sum()), float(real.any(1).sum()), 0.0])  # no pairs
    totals = [torch.stack([flat(mine[j].routing) for mine in outputs]).sum(0) for j in range(rounds)]
    values, step_losses = torch.zeros(5), []
    for mine, their_outputs in zip(batches, outputs):
        step_loss = StepLoss(cfg.model, Split(len(split), [counts, *totals]), mine)
        for output in their_outputs:
            losses = step_loss(output)
            (losses.total / len(split)).backward(retain_graph=True)
            values += torch.stack([part.detach() for part in losses[:5]]) / len(split)
        step_losses.append(step_loss)
    return values, {name: p.grad for name, p in model.named_parameters()}, [step_losses[0].routing.tokens_per_expert_E]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scope", ["global", "sequence"])
@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_any_split_over_ranks_is_the_same_number_and_gradient(split, scope):
    assert_same(step_of(split, scope=scope), step_of([ROWS], scope=scope))


OWN = {
    "type": "noisy_top_k",
    "noise": False,
    "importance_coef": 0.3,
    "load_coef": 0.2,
    "local_entropy_coef": 0.1,
    "global_entropy_coef": 0.2,
}


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_also_with_losses_of_the_routers_own(split):
    found, expected = step_of(split, router=OWN), step_of([ROWS], router=OWN)
    assert_same(found, expected)
    without = step_of([ROWS], router={**OWN, "importance_coef": 0.0})
    assert without[0][0] < expected[0][0]


def test_losses_of_the_routers_own_over_micro_batches():
    """The sums are those seen so far, scaled up to all tokens: what is told is exact, and where micro-batches are alike
    the gradient is too."""
    exact, parts = step_of([ROWS], router=OWN), step_of([ROWS // 2], rounds=2, router=OWN)
    own = [whole[0][0] - whole[0][1] - 0.05 * whole[0][2] - 0.01 * whole[0][3] for whole in (parts, exact)]
    assert abs(own[1]) > 0.01
    torch.testing.assert_close(own[0], own[1], rtol=1e-3, atol=0)
    assert_same(step_of([ROWS // 2], rounds=2, alike=True, router=OWN), step_of([ROWS], alike=True, router=OWN))


@pytest.mark.parametrize("split", [[1, 2], [1, 1, 1]], ids=str)
def test_also_with_accumulation(split):
    assert_same(step_of(split, rounds=2), step_of([ROWS // 2], rounds=2))


def test_one_round_on_one_rank_is_the_models_own_loss():
    cfg = config(1, 1, 1)
    output = build_model(cfg.model, seed=3)(**model_inputs(rows(0, 0, ROWS)))
    (total, lm, aux, z, distill), _, _ = step_of([ROWS])
    expected = (output.loss, output.loss_sum / output.num_targets, output.aux_loss, output.z_loss)
    for found, value in zip((total, lm, aux, z), expected):
        torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=0)
    assert distill == 0  # without a teacher


def test_the_split_matters_in_transformers_scope_alone():
    """There each rank balances its own tokens: this is what the global scope is for."""
    whole, parts = (step_of(split, scope="transformers")[0] for split in ([ROWS], [1, 5]))
    assert abs(whole[2] - parts[2]) > 1e-3
    torch.testing.assert_close(whole[1], parts[1])
    torch.testing.assert_close(whole[3], parts[3])


def test_padding_counts_in_nothing():
    """What stands in the padding, and how much of it there is, changes neither losses nor statistics."""
    cfg = config(1, 1, 1)
    batch = rows(0, 0, ROWS)
    real = batch.attention_mask_BS
    assert not real.all()
    results = []
    for filler in (0, 7):
        model = build_model(cfg.model, seed=3)
        ids = batch.input_ids_BS.masked_fill(~real, filler)
        output = model(**{**model_inputs(batch), "input_ids": ids})
        counts = torch.tensor([float(batch.num_targets), float(real.sum()), float(real.any(1).sum()), 0.0])
        step_loss = StepLoss(cfg.model, Split(1, [counts, flat(output.routing)]), [batch])
        losses, summed = step_loss(output), step_loss.routing
        assert summed.num_tokens.tolist() == [real.sum().item()] * 2
        assert summed.tokens_per_expert_E.sum(-1).tolist() == [2 * real.sum().item()] * 2
        results.append(torch.stack([part.detach() for part in losses[:5]]))
    assert torch.equal(*results)


def test_statistics_are_summed_in_one_exchange_and_keep_their_shapes():
    output = build_model(config(1, 1, 1).model, seed=3)(**model_inputs(rows(0, 0, 2)))
    sent = []

    class Ranks:
        def sum(self, tensor):
            sent.append(tensor)
            return 3 * tensor

    summed = sum_over_ranks(output.routing, Ranks())
    assert len(sent) == 1
    for part, total in zip(output.routing, summed):
        assert not total.requires_grad
        torch.testing.assert_close(total, 3 * part.detach())

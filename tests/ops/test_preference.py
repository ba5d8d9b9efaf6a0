"""Losses of pairs against their papers' formulas, from logits on."""

import math

import pytest
import torch

from moe_llm.ops.preference import Preference, losses_of_pairs, preference_sums

LOGP, REFERENCE, TOKENS = [-6.0, -4.0], [-5.0, -5.0], [3.0, 2.0]


@pytest.mark.parametrize(
    ("loss", "beta", "gamma", "smoothing", "expected"),
    [
        ("dpo", 0.1, 0, 0, math.log1p(math.exp(0.1 * 2))),
        ("dpo", 0.1, 0, 0.2, 0.8 * math.log1p(math.exp(0.2)) + 0.2 * math.log1p(math.exp(-0.2))),
        ("dpo_norm", 0.5, 0, 0, math.log1p(math.exp(0.5 * (1 / 3 + 1 / 2)))),
        ("ipo", 0.5, 0, 0, (-1 / 3 - 1 / 2 - 1) ** 2),
        ("simpo", 2.0, 0.5, 0, math.log1p(math.exp(0.5))),  # both answers have a mean of -2
        ("orpo", 0.7, 0, 0, 2 + 0.7 * math.log(2)),
    ],
)
def test_each_loss_is_its_papers_formula(loss, beta, gamma, smoothing, expected):
    given = (torch.tensor([values], dtype=torch.float64) for values in (LOGP, REFERENCE, TOKENS))
    found, _ = losses_of_pairs(*given, Preference(loss, beta, gamma, smoothing, torch.zeros(1, 1)))
    assert found.item() == pytest.approx(expected)


def test_sums_do_not_depend_on_how_pairs_lie_in_blocks():
    nll = torch.tensor([[0.5, 1.0, 2.0, 0.25, 3.0, 0.0, 0.0]])
    targets = torch.tensor([[1, 1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    documents = torch.tensor([[0, 0, 1, 2, 2, 3, -1]])
    nll = nll * targets
    reference = torch.tensor([[-1.0, 0, -0.5, -2.0, 0, -0.1, 0]])
    whole = preference_sums(nll, targets, documents, Preference("dpo", 0.3, 0, 0, reference))
    parts = []
    for places in (slice(0, 3), slice(3, 6)):
        document = documents[:, places] - documents[:, places].min()
        part = Preference("dpo", 0.3, 0, 0, reference[:, places])
        parts.append(preference_sums(nll[:, places], targets[:, places], document, part))
    assert whole.pairs == 2
    for field in ("objective", "pairs", "measured", "chosen"):
        torch.testing.assert_close(getattr(whole, field), getattr(parts[0], field) + getattr(parts[1], field))
    assert whole.logp_BD[0, :4].tolist() == [-1.5, -2.0, -3.0, 0.0]

"""Losses of routers that learn from the tokens' own cross-entropies: REINFORCE and expectation maximisation.

Dimensions: T real tokens, document after document; L sparse layers, E experts, K choices, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from moe_llm.doctor.oracle.blocks import Sparse


def policy(
    blocks: Sequence[Sparse], inputs: Sequence[torch.Tensor], nll_T: torch.Tensor, targets_T: torch.Tensor, sizes: Any
) -> torch.Tensor:
    """(L, 2): sums over the targets of (cost - baseline) log pi, times L, and of the baseline's squared error (Williams
    1992). Costs are the tokens' cross-entropies, and what loaded experts cost beside that.

    Args:
        inputs: the hidden states that each router saw, (T, D).
        targets_T: bool, which tokens have a target; the others' cross-entropies are 0.
    """
    sums = []
    for block, x_TD in zip(blocks, inputs):
        gate = block.gate_tensors
        router: Any = block.router
        assert block.choice is not None
        logits_TE, top_k = block.choice.logits_TE, block.config.num_experts_per_tok
        expert_TK = logits_TE.topk(top_k, dim=-1).indices
        cost_T, counted_T = nll_T.detach(), targets_T
        if router.load_coef:
            load_E = gate["load"]
            excess_E = load_E * len(load_E) - 1 if load_E.sum() > 0 else torch.zeros_like(load_E)
            cost_T = cost_T + router.load_coef * excess_E[expert_TK].mean(-1)
        if router.baseline == "learned":
            baseline_T = F.linear(x_TD.detach(), gate["baseline_weight"])[:, 0]
        else:
            baseline_T, known_T = _means_before(cost_T, targets_T, sizes)
            counted_T = counted_T & known_T
        error_T = (cost_T - baseline_T)[counted_T]
        log_pi_T = _log_probability(logits_TE, expert_TK)[counted_T]
        sums.append(torch.stack([len(blocks) * (error_T.detach() * log_pi_T).sum(), error_T.square().sum()]))
    return torch.stack(sums)


def _log_probability(logits_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    """Of drawing them one after the other without putting back: product over k of exp(l_k) / sum over those that are left
    (Plackett 1975)."""
    value_TK = logits_TE.gather(-1, expert_TK)
    total_T = torch.zeros_like(value_TK[:, 0])
    left_TE = torch.ones_like(logits_TE, dtype=torch.bool)
    for k in range(expert_TK.shape[1]):
        rest_T = torch.where(left_TE, logits_TE, -torch.inf).logsumexp(-1)
        total_T = total_T + value_TK[:, k] - rest_T
        left_TE = left_TE & ~F.one_hot(expert_TK[:, k], logits_TE.shape[-1]).bool()
    return total_T


def _means_before(value_T: torch.Tensor, targets_T: torch.Tensor, sizes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the targets before each token in its document, and whether there is one."""
    means, known = [], []
    for value_n, is_target_n in zip(value_T.split(sizes), targets_T.split(sizes)):
        count_n = is_target_n.cumsum(0) - is_target_n.long()
        sum_n = (value_n * is_target_n).cumsum(0) - value_n * is_target_n
        means.append(sum_n / count_n.clamp(min=1))
        known.append(count_n > 0)
    return torch.cat(means), torch.cat(known)


def expectation_maximisation(
    blocks: Sequence[Sparse],
    stream_TD: torch.Tensor,
    labels_T: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """(L, 2): of the last layer, sums over the targets of the gate's cross-entropy to the experts' posterior, and of the
    experts' own losses times it (Jordan and Jacobs 1994, section 3), times L; zeros of the others.

    Args:
        stream_TD: hidden states before the final norm. logits_of: of such, over the vocabulary.
    """
    block = blocks[-1]
    choice, every_TED, mixed_TD = block.choice, block.every_TED, block.mixed_TD
    assert choice is not None
    assert every_TED is not None
    assert mixed_TD is not None
    targets_T = labels_T != -100
    log_gate_TE = choice.logits_TE.log_softmax(-1)
    alone_TED = stream_TD[:, None] - mixed_TD[:, None] + every_TED
    losses = [
        F.cross_entropy(logits_of(alone_TED[:, e]), labels_T, reduction="none") for e in range(len(log_gate_TE[0]))
    ]
    loss_TE = torch.stack(losses, 1)
    joint_TE = (log_gate_TE - loss_TE).detach()
    share_TE = joint_TE.softmax(-1)
    if block.router.form == "hard":
        share_TE = F.one_hot(joint_TE.argmax(-1), joint_TE.shape[-1]).float()
    share_TE = share_TE * targets_T[:, None]
    sums_2 = torch.stack([-(share_TE * log_gate_TE).sum(), (share_TE * loss_TE).sum()])
    zeros = [torch.zeros(2)] * (len(blocks) - 1)
    return torch.stack([*zeros, len(blocks) * sums_2])

"""The record that a router returns and dispatch, experts and combine understand: `Routing` of those that send tokens to
experts, `WeightMixture` of those that mix the experts' weights instead.

Dimensions: B sequences, T tokens, D hidden, E experts, K experts per token, N routed rows (T*K for token choice),
L layers, R what is routed in the tokens' place, W its width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_llm.model.moe.segments import Segments
from moe_llm.model.sequence_parts import SequenceParts


class RoutingStatistics(NamedTuple):
    """Sums over the real (not padding) tokens, so that they add up over ranks and micro-batches; fp32.

    One layer's have the shapes below; `stack` gives them a leading L. tokens_per_expert_E counts choices before any
    limit of capacity; dropped those that no expert had room for. entropy_sum has a gradient where a loss asks for it.
    """

    tokens_per_expert_E: Tensor
    probability_sum_E: Tensor  # the router's probabilities, with gradient
    sequence_balance: Tensor  # sum over sequences of each one's own balance loss, with gradient; 0 if not asked for
    z_sum: Tensor  # logsumexp(logits)^2, with gradient
    entropy_sum: Tensor  # the router's entropy in nats
    dropped: Tensor
    num_tokens: Tensor
    num_sequences: Tensor  # that have a real token
    extra_X: Tensor  # whatever else the router's own losses and updates need, with gradient; X is 0 for most
    feedback_TX: (
        Tensor  # no sum: what `Router.feedback` makes `extra_X` of, a row for each token; empty but between the two
    )

    @staticmethod
    def stack(layers: "list[RoutingStatistics]") -> "RoutingStatistics":
        return RoutingStatistics(*(torch.stack(parts) for parts in zip(*layers)))

    def plus(self, other: "RoutingStatistics | None") -> "RoutingStatistics":
        return self if other is None else RoutingStatistics(*(a + b for a, b in zip(self, other)))

    def layers(self) -> "list[RoutingStatistics]":
        """What `stack` was given."""
        return [RoutingStatistics(*parts) for parts in zip(*self)]


class Routing(NamedTuple):
    """Which token goes to which expert, as flat rows sorted by expert.

    slot_TK holds the rows of each token where every token has exactly K of them (then combining is a
    gather); it is None where their number varies. kept_R is what each token itself, as the experts see it, is
    multiplied by and added to their outputs; None: no token is.

    A router may put something else in the tokens' place, such as slots or parts of tokens: the experts then work on
    `entered_RW`, to which the rows refer, and `combine_fn` makes the tokens' outputs of theirs. What `combine_fn` needs of the
    router's parameters it reaches through a module, whose call gathers them where they are spread over ranks. `hand_on`
    is for routers that learn from the tokens' losses and need the experts' outputs for it.
    """

    token_index_N: Tensor  # int64, the token of each row
    weight_N: Tensor  # fp32, what the expert's output is multiplied by, with gradient
    counts_E: Tensor  # int64, rows of each expert, padding tokens included
    slot_TK: Tensor | None  # int64
    logits_TE: Tensor  # fp32
    statistics: RoutingStatistics
    entered_RW: Tensor | None = None
    combine_fn: Callable[[Tensor], Tensor] | None = None  # (R, W) to (T, D)
    kept_R: Tensor | None = None  # fp32, with gradient
    queued: "Routing | None" = None  # rows that the same experts take in a second round; of it the rows alone are read
    hand_on: Callable[[Tensor], Tensor] | None = None  # (R, W) to the statistics' `feedback_TX`


class WeightMixture(NamedTuple):
    """Which mixture of the experts' weights the tokens of each segment pass through."""

    segments: Segments
    probability_NE: Tensor  # fp32, of each sequence's segments in turn, with gradient
    statistics: RoutingStatistics


def router_statistics(
    logits_TE: Tensor,
    probability_TE: Tensor,
    expert_TK: Tensor,
    mask_BS: Tensor,
    *,
    per_sequence: bool,
    dropped: Tensor | None = None,
    taken_TK: Tensor | None = None,
    entropy_T: Tensor | None = None,
    entropy_gradient: bool = False,
    extra_X: Tensor | None = None,
    parts: SequenceParts | None = None,
) -> RoutingStatistics:
    """Sums over the tokens for which `mask_BS` (bool) holds.

    per_sequence: also form the balance loss of each sequence by itself (DeepSeek-AI 2024, equations 17 to 20, in the
    normalisation of `balance.balance_loss`).
    entropy_T: of the distributions, nats, where these are not the softmax of the logits.
    taken_TK: which of the choices count, or how much of each; all, where it is None.
    parts: the ranks that share the sequences, of which each counts its own tokens, and the first one the sequences.
    """
    (sequences, length), experts = mask_BS.shape, logits_TE.shape[-1]
    weight_T = mask_BS.flatten().to(logits_TE.dtype)
    log_z_T = logits_TE.logsumexp(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        if entropy_T is None:
            entropy_T = log_z_T - (probability_TE * logits_TE).sum(-1)
    with torch.no_grad():
        rows = sequences if per_sequence else 1
        row_T = torch.arange(sequences, device=mask_BS.device).repeat_interleave(length) if per_sequence else None
        flat_TK = expert_TK if row_T is None else expert_TK + (row_T * experts)[:, None]
        counted_TK = weight_T[:, None].expand_as(flat_TK)
        if taken_TK is not None:
            counted_TK = counted_TK * taken_TK
        count_RE = (
            logits_TE.new_zeros(rows * experts)
            .scatter_add_(0, flat_TK.flatten(), counted_TK.flatten())
            .view(rows, experts)
        )
        tokens_B = weight_T.view(sequences, length).sum(1)
        whole_RE = count_RE
        if parts is not None and per_sequence:
            whole_RE, tokens_B = parts.sum(count_RE), parts.sum(tokens_B)
    sequence_balance = logits_TE.new_zeros(())
    if per_sequence:
        probability_BE = torch.einsum(
            "bs,bse->be", weight_T.view(sequences, length), probability_TE.view(sequences, length, experts)
        )
        sequence_balance = experts * ((whole_RE * probability_BE).sum(-1) / tokens_B.clamp(min=1).square()).sum()
    nothing_X = logits_TE.new_zeros(0)
    num_sequences = (tokens_B > 0).sum().to(logits_TE.dtype)
    return RoutingStatistics(
        tokens_per_expert_E=count_RE.sum(0),
        probability_sum_E=weight_T @ probability_TE,
        sequence_balance=sequence_balance,
        z_sum=weight_T @ log_z_T.square(),
        entropy_sum=weight_T @ entropy_T,
        dropped=logits_TE.new_zeros(()) if dropped is None else dropped.to(logits_TE.dtype),
        num_tokens=weight_T.sum(),
        num_sequences=num_sequences if parts is None or parts.index == 0 else torch.zeros_like(num_sequences),
        extra_X=nothing_X if extra_X is None else extra_X,
        feedback_TX=nothing_X,
    )

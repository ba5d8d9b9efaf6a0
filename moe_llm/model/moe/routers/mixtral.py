"""Mixtral's router (Jiang et al. 2024, section 2.1): softmax over experts, top-k, renormalised.

Dimensions: B sequences, S positions, T = B*S tokens, D hidden, E experts, K experts per token, N routed rows,
R choices that a token may propose.
"""

import torch
from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.moe.capacity import assign, capacity_of
from moe_llm.model.moe.routing import Routing, router_statistics
from moe_llm.ops.permutation import sort_by_expert
from moe_llm.ops.wide_linear import wide_linear


class MixtralRouter(nn.Module):
    """Softmax of a linear map, in fp32 whatever the model's dtype; weights of the top k sum to one.

    With `router_jitter_noise` x and in training, the router's own input (not the experts') is multiplied
    by uniform(1 - x, 1 + x), as in Switch Transformers (Fedus et al. 2021, section 2.4).

    With `router.capacity_factor`, and in training, an expert takes a limited number of tokens from each sequence
    (see `capacity`); in evaluation none is dropped, so that the model computes what its export does.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.top_k = config.num_experts_per_tok
        self.jitter = config.router_jitter_noise
        self.capacity_factor = config.router.capacity_factor
        self.pass_on = config.router.overflow == "next"
        self.per_sequence = config.router_aux_loss_scope == "sequence"
        self.low_rank: tuple[float, float] | None = None  # scale and dropout of an adapter
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, x_BSD: Tensor, real_BS: Tensor) -> Routing:
        x_TD = x_BSD.flatten(0, 1)
        if self.training and self.jitter:
            noise_TD = torch.empty_like(x_TD, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
            x_TD = x_TD.float() * noise_TD
        logits_TE = wide_linear(x_TD, self.weight)
        if self.low_rank is not None:
            logits_TE = logits_TE + self._adapter(x_TD)
        probability_TE = logits_TE.softmax(-1)
        if self.training and self.capacity_factor is not None:
            return self._within_capacity(logits_TE, probability_TE, real_BS)
        expert_TK = probability_TE.topk(self.top_k, dim=-1).indices
        weight_TK = probability_TE.gather(-1, expert_TK)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        token_index_N, order_N, slot_TK, counts_E = sort_by_expert(expert_TK, self.num_experts)
        return Routing(
            token_index_N=token_index_N,
            weight_N=weight_TK.flatten()[order_N],
            counts_E=counts_E,
            slot_TK=slot_TK,
            logits_TE=logits_TE,
            statistics=router_statistics(
                logits_TE, probability_TE, expert_TK, real_BS, per_sequence=self.per_sequence
            ),
        )

    def adapt(self, name: str, rank: int, scale: float, dropout: float) -> None:
        """Give the weight low-rank factors, as `NAME_lora_A` and `NAME_lora_B`, uninitialised."""
        rows, columns = getattr(self, name).shape
        for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            setattr(self, f"{name}_lora_{factor}", nn.Parameter(torch.empty(shape)))
        self.low_rank = scale, dropout

    def _adapter(self, x_TD: Tensor) -> Tensor:
        """scale * B A x, in fp32 as the logits are."""
        scale, dropout = self.low_rank
        dropped_TD = torch.nn.functional.dropout(x_TD, dropout, self.training)
        return wide_linear(wide_linear(dropped_TD, self.weight_lora_A), self.weight_lora_B) * scale

    def _within_capacity(self, logits_TE: Tensor, probability_TE: Tensor, real_BS: Tensor) -> Routing:
        """The same with a bound on rows per expert and sequence; padding gets no expert.

        Dropped choices keep their share of the weight, which then falls to the residual stream alone; passed on, the
        weights are those of the experts that took the token.
        """
        proposals = self.num_experts if self.pass_on else self.top_k
        expert_TR = probability_TE.topk(proposals, dim=-1).indices
        capacity = capacity_of(self.capacity_factor, real_BS.shape[1], self.top_k, self.num_experts)
        granted_TR = assign(
            expert_TR.view(*real_BS.shape, proposals), real_BS, self.top_k, self.num_experts, capacity
        ).flatten(0, 1)
        weight_TR = probability_TE.gather(-1, expert_TR)
        shared_TR = weight_TR * granted_TR if self.pass_on else weight_TR
        weight_TR = weight_TR / shared_TR.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_TR.dtype).tiny)
        # Ungranted choices sort behind the last expert and are cut off there.
        sorted_by = expert_TR.masked_fill(~granted_TR, self.num_experts)
        token_index_N, order_N, _, counts = sort_by_expert(sorted_by, self.num_experts + 1)
        rows = int(granted_TR.sum())
        asked = real_BS.sum() * self.top_k
        return Routing(
            token_index_N=token_index_N[:rows],
            weight_N=weight_TR.flatten()[order_N[:rows]],
            counts_E=counts[:-1],
            slot_TK=None,
            logits_TE=logits_TE,
            statistics=router_statistics(
                logits_TE, probability_TE, expert_TR[:, : self.top_k], real_BS,
                per_sequence=self.per_sequence, dropped=asked - rows,
            ),
        )

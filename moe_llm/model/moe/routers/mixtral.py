"""Mixtral's router (Jiang et al. 2024, section 2.1): softmax over experts, top-k, renormalised."""

import torch
from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.moe.routing import Routing, router_statistics
from moe_llm.ops.permutation import sort_by_expert
from moe_llm.ops.wide_linear import wide_linear


class MixtralRouter(nn.Module):
    """Softmax of a linear map, in fp32 whatever the model's dtype; weights of the top k sum to one.

    With `router_jitter_noise` x and in training, the router's own input (not the experts') is multiplied
    by uniform(1 - x, 1 + x), as in Switch Transformers (Fedus et al. 2021, section 2.4).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.top_k = config.num_experts_per_tok
        self.jitter = config.router_jitter_noise
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, x_TD: Tensor, real_T: Tensor | None) -> Routing:
        if self.training and self.jitter:
            noise_TD = torch.empty_like(x_TD, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
            x_TD = x_TD.float() * noise_TD
        logits_TE = wide_linear(x_TD, self.weight)
        probability_TE = logits_TE.softmax(-1)
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
            statistics=router_statistics(logits_TE, probability_TE, expert_TK, real_T),
        )

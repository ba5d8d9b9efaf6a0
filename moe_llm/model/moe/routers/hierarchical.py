"""Groups first, then experts within the group (Jordan and Jacobs 1994; Shazeer et al. 2017, appendix B).

Dimensions: B sequences, S positions, T = B*S tokens, E experts, G groups, M = E / G experts a group, P groups per
token, Q experts per chosen group, K = P * Q.
"""

from torch import Tensor

from moe_llm.config.routers import HierarchicalSettings
from moe_llm.model.moe.router import Router, rows_by_token
from moe_llm.model.moe.routing import Routing


class HierarchicalRouter(Router):
    """y = sum over chosen groups g of G(x)_g * sum over chosen experts e of g of G_g(x)_e * expert_ge(x), each gating
    a softmax of its top few (equation 12).

    Over all experts the distribution is the product of both softmaxes; its logits are such that their logsumexp is the
    groups', and the z-loss has that of each group beside it.
    """

    Settings = HierarchicalSettings
    settings: HierarchicalSettings

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Routing:
        x_TD, groups, chosen = self.input(x_BSD), self.settings.groups, self.settings.groups_per_token
        group_TG = self.linear(x_TD, "group_weight")
        within_TGM = self.linear(x_TD, "weight").unflatten(-1, (groups, -1))
        size = within_TGM.shape[-1]

        group_TP = group_TG.topk(chosen, dim=-1).indices
        gate_TP = group_TG.gather(-1, group_TP).softmax(-1)
        inside_TPM = within_TGM.gather(1, group_TP[..., None].expand(*group_TP.shape, size))
        expert_TPQ = inside_TPM.topk(self.top_k // chosen, dim=-1).indices
        gate_TPQ = gate_TP[..., None] * inside_TPM.gather(-1, expert_TPQ).softmax(-1)
        expert_TK = (group_TP[..., None] * size + expert_TPQ).flatten(1)

        logits_TE = (group_TG[..., None] + within_TGM.log_softmax(-1)).flatten(1)
        statistics = self.statistics(logits_TE, logits_TE.softmax(-1), expert_TK, mask_BS)
        inner_T = within_TGM.logsumexp(-1).square().mean(-1)
        z_sum = statistics.z_sum + mask_BS.flatten().to(inner_T.dtype) @ inner_T
        return Routing(
            **rows_by_token(expert_TK, gate_TPQ.flatten(1), self.num_experts),
            logits_TE=logits_TE,
            statistics=statistics._replace(z_sum=z_sum),
        )

"""Noisy top-k gating (Shazeer et al. 2017, section 2.1 and appendix A), with its importance and load losses.

Dimensions: T tokens, D hidden, E experts, K experts per token, R choices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.config.routers import NoisyTopKSettings, RouterSettings
from moe_llm.model.moe.losses import RouterLoss, cv_squared
from moe_llm.model.moe.router import TokenChoiceRouter
from moe_llm.model.moe.routing import Routing

_FAR = 1e4


class NoisyTopKRouter(TokenChoiceRouter):
    """H(x) = W x + normal * softplus(W_noise x) while training, W x otherwise; weights are the softmax of its top k
    (equations 3 to 5). Both matrices begin at zero, so that the noise alone spreads the first tokens (appendix A)."""

    Settings = NoisyTopKSettings
    settings: NoisyTopKSettings
    zero_parameters = ("weight", "noise_weight")

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        x_TD = self.input(x_BSD)
        clean_TE = noisy_TE = self.linear(x_TD, "weight")
        deviation_TE = F.softplus(self.linear(x_TD, "noise_weight"))
        if self.training:
            noise_TE = torch.randn_like(clean_TE) if self.settings.noise else torch.zeros_like(clean_TE)
            noisy_TE = clean_TE + noise_TE * deviation_TE  # with zeros too every parameter has a gradient, as it must
        noisy_TE = self.without_closed(noisy_TE)
        weight_T1 = mask_BS.flatten().to(clean_TE.dtype)[:, None]

        def measure(expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
            gates_TE = torch.zeros_like(clean_TE).scatter(-1, expert_TK, weight_TK)
            load_TE = self._expected_load(clean_TE, noisy_TE, deviation_TE)
            return torch.cat([(gates_TE * weight_T1).sum(0), (load_TE * weight_T1).sum(0)])

        return self.route(noisy_TE, noisy_TE.softmax(-1), self.groups(mask_BS, document_BS), measure)

    def _expected_load(self, clean_TE: Tensor, noisy_TE: Tensor, deviation_TE: Tensor) -> Tensor:
        """The probability that an expert would be chosen if its own noise alone were drawn again (equations 8, 9)."""
        if self.top_k == self.num_experts:
            return torch.ones_like(clean_TE)
        best_TK = noisy_TE.topk(self.top_k + 1, dim=-1).values
        inside_TE = noisy_TE >= best_TK[:, -2:-1]
        # the k-th largest of the others: for one of the top k, that is the (k + 1)-th of all
        threshold_TE = torch.where(inside_TE, best_TK[:, -1:], best_TK[:, -2:-1])
        distance_TE = (clean_TE - threshold_TE).clamp(-_FAR, _FAR)  # closed experts are farther than can be divided
        load_TE = torch.special.ndtr(distance_TE / deviation_TE)
        closed_TE = self.closed(noisy_TE)
        return load_TE if closed_TE is None else load_TE.masked_fill(closed_TE, 0.0)

    @classmethod
    def losses(cls, settings: RouterSettings) -> list[RouterLoss]:
        assert isinstance(settings, NoisyTopKSettings)
        found = [
            RouterLoss("importance_loss", settings.importance_coef, lambda s: cv_squared(s.extra_X.chunk(2)[0])),
            RouterLoss("load_loss", settings.load_coef, lambda s: cv_squared(s.extra_X.chunk(2)[1])),
        ]
        return super().losses(settings) + [loss for loss in found if loss.coefficient]

"""Parts of tokens routed apart (Wu et al. 2024, "Multi-Head Mixture-of-Experts").

Dimensions: B sequences, S positions, T = B*S tokens, D hidden, H heads, W = D / H, R = T*H parts of tokens.
"""

from typing import ClassVar

from torch import Tensor

from moe_llm.config.routers_mixed import MultiHeadSettings
from moe_llm.model.layers import Linear
from moe_llm.model.moe.router import TokenChoiceRouter
from moe_llm.model.moe.routing import Routing


class MultiHeadRouter(TokenChoiceRouter):
    """A linear map of each token is cut into H parts. Each takes its top k of a softmax over experts that work on
    vectors of W, weighted by their probabilities; what they made of a token's parts, side by side, goes through another
    linear map.

    To losses, limits of capacity and statistics a part is what a token is elsewhere: all count parts, and a token's
    stand side by side in its sequence.
    """

    Settings = MultiHeadSettings
    gains: ClassVar[dict[str, float]] = {"head_proj.weight": 0.5**0.5, "merge_proj.weight": 1.0}
    settings: MultiHeadSettings
    head_proj: Linear
    merge_proj: Linear

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        heads = self.settings.heads
        part_BPW = self.head_proj(x_BSD).unflatten(-1, (heads, -1)).flatten(1, 2)
        groups = self.groups(mask_BS, document_BS).repeat(heads)
        logits_RE = self.logits(part_BPW)
        routing = self.route(logits_RE, logits_RE.softmax(-1), groups)

        def combine_fn(y_RW: Tensor) -> Tensor:
            return self.merge_proj(y_RW.unflatten(0, (-1, heads)).flatten(1))

        return routing._replace(entered_RW=part_BPW.flatten(0, 1), combine_fn=combine_fn)

    def weights(self, value_TR: Tensor, shared_TR: Tensor) -> Tensor:
        return super().weights(value_TR, shared_TR) if self.settings.norm_topk_prob else value_TR

"""A gate that reads the text: a small causal transformer block before the linear map (pre-norm block of Vaswani et al.
2017 and Xiong et al. 2020), the form of contextual gates in surveys of mixtures of experts.

Dimensions: B sequences, S positions, T = B*S tokens, D hidden, W the block's width, H heads, E experts.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_llm.config.routers_learned import TransformerSettings
from moe_llm.model.moe.capacity import Groups
from moe_llm.model.moe.router import TokenChoiceRouter
from moe_llm.model.moe.routing import Routing


class TransformerRouter(TokenChoiceRouter):
    """h = W_in x; h += attention(norm(h)); h += W_down gelu(W_up norm(h)); logits = W norm(h); the top k of their softmax,
    renormalised.

    Attention is causal, within the document, without positions, in fp32. Generation has to read the text again for each
    token, since no cache holds what the gate has seen.
    """

    Settings = TransformerSettings
    settings: TransformerSettings
    attention_norm: Tensor
    mlp_norm: Tensor
    norm: Tensor
    gains: ClassVar[dict[str, float]] = dict.fromkeys(
        ("weight", "input_weight", "qkv_weight", "output_weight", "up_weight", "down_weight"), 1.0
    )

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        h_TW = self.linear(self.input(x_BSD), "input_weight")
        qkv_TQ = self.linear(_rms(h_TW, self.attention_norm), "qkv_weight")
        query, key, value = (
            part_TW.unflatten(0, mask_BS.shape).unflatten(-1, (self.settings.heads, -1)).transpose(1, 2)
            for part_TW in qkv_TQ.chunk(3, -1)
        )
        seen_B1SS = self._seen(mask_BS, document_BS)[:, None]
        attended_BHSw = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_B1SS)
        h_TW = h_TW + self.linear(attended_BHSw.transpose(1, 2).flatten(2).flatten(0, 1), "output_weight")
        h_TW = h_TW + self.linear(F.gelu(self.linear(_rms(h_TW, self.mlp_norm), "up_weight")), "down_weight")
        logits_TE = self.without_closed(self.linear(_rms(h_TW, self.norm), "weight"))
        return self.route(logits_TE, logits_TE.softmax(-1), self.groups(mask_BS, document_BS))

    def _seen(self, mask_BS: Tensor, document_BS: Tensor | None) -> Tensor:
        """Which position reads which, bool (B, S, S): real tokens of its document up to itself; padding reads itself."""
        place_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
        groups = Groups.of(mask_BS, document_BS)
        same_BSS = groups.start_BS[:, :, None] == groups.start_BS[:, None, :]
        seen_BSS = same_BSS & mask_BS[:, None, :] & (place_S[:, None] >= place_S)
        if self.settings.window is not None:
            rank_BS = groups.rank()
            seen_BSS = seen_BSS & (rank_BS[:, :, None] - rank_BS[:, None, :] < self.settings.window)
        return seen_BSS | torch.eye(len(place_S), dtype=torch.bool, device=mask_BS.device)


def _rms(x_TW: Tensor, scale_W: Tensor) -> Tensor:
    return F.rms_norm(x_TW, scale_W.shape, scale_W.to(x_TW.dtype), 1e-6)

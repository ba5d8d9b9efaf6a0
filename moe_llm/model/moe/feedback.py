"""What routers learn from the tokens' own losses: the door from the head back to the layers.

A router whose settings have `learns_from_loss` hands on a tensor with its statistics while training (`feedback_TX`, a row for each token);
once the head has judged the tokens, its `feedback` makes of that the sums that its losses are formed from.
Dimensions: T tokens, D hidden, E alternatives to a token's hidden state.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_llm.model.moe.capacity import Groups


class TokenLosses:
    """Cross-entropies (nats, fp32) of a micro-batch's tokens; 0 where there is no target.

    targets_T: bool, which tokens have one. layers: how many routers share a loss's mean, so that a sum times it counts in
    full.
    """

    def __init__(
        self, score: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, targets_T: Tensor, groups: Groups, layers: int
    ):
        """score: losses (N,) of hidden states (N, D) before the final norm, and targets (N,)."""
        self._score, self._x_TD, self._labels_T, self._groups = score, x_TD, targets_T, groups
        self.targets_T, self.layers = targets_T != -100, layers
        self._of_tokens: Tensor | None = None

    def of_tokens(self) -> Tensor:
        """Of the hidden states as they are, (T,), without gradient."""
        if self._of_tokens is None:
            with torch.no_grad():
                self._of_tokens = self._score(self._x_TD, self._labels_T)
        return self._of_tokens

    def of_changes(self, change_TED: Tensor) -> Tensor:
        """If instead something had been added to them, (T, E), with gradient through the change and the head."""
        x_TED = self._x_TD[:, None] + change_TED.to(self._x_TD.dtype)
        labels_TE = self._labels_T[:, None].expand(change_TED.shape[:2])
        return self._score(x_TED.flatten(0, 1), labels_TE.flatten()).unflatten(0, labels_TE.shape)

    def mean_before(self, value_T: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the targets before each token in its document, (T,), and whether there is one, bool (T,)."""
        counted_TX = torch.stack([torch.where(self.targets_T, value_T, 0.0), self.targets_T.to(value_T.dtype)], -1)
        sum_T, count_T = (
            self._groups.before(counted_TX.unflatten(0, self._groups.mask_BS.shape)).flatten(0, 1).unbind(-1)
        )
        return sum_T / count_T.clamp(min=1), count_T > 0

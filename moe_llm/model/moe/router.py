"""What every router is built on. One file each in `routers/`.

A router maps hidden states to a `Routing`, or to a `WeightMixture` where experts' weights are mixed; that is all that
dispatch, experts, combine and statistics know of it.
Dimensions: B sequences, S positions, T = B*S tokens, D hidden, E experts, R choices of a token, N routed rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.config.routers import RouterSettings
from moe_llm.model.linear import Linear
from moe_llm.model.moe.feedback import TokenLosses
from moe_llm.model.moe.losses import RouterLoss, entropy_losses
from moe_llm.model.moe.routing import Routing, RoutingStatistics, WeightMixture, router_statistics
from moe_llm.model.sequence_parts import SequenceParts, own, whole
from moe_llm.ops import host
from moe_llm.ops.permutation import sort_by_expert
from moe_llm.ops.wide_linear import wide_linear


class Router(nn.Module, ABC):
    """Base of all routers. A subclass names its settings, writes `forward`, and may have losses and an update.

    Parameters and buffers are those that the settings name; `NAME.weight` is that of a linear map `NAME`. Parameters
    begin with normal weights of deviation `initializer_range`, but for those in `zero_parameters` and `gains`, and
    vectors with ones; buffers with zero. Buffers stay fp32 whatever the model's dtype.

    gains: name -> gain of maps that begin with Glorot's deviation, gain * sqrt(2 / (rows + columns)).

    by_document: `forward` takes the documents' ids (B, S) too, None where they are not isolated.

    A router whose settings have `learns_from_loss` hands something on while training (`RoutingStatistics.handed_TX`) of
    which `feedback` makes sums, once the tokens' losses are known. last: whether this is the last layer's.

    step: the optimizer step that is being computed, counted from 0; set by the training loop.

    parts: set by sequence parallelism, under which inputs are this rank's positions. What a router does by documents or
    sequences, it does on `whole` ones, and takes its `own` part of the result.
    """

    Settings: ClassVar[type[RouterSettings]]
    zero_parameters: ClassVar[tuple[str, ...]] = ()
    gains: ClassVar[dict[str, float]] = {}
    by_document: ClassVar[bool] = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.settings = config.router
        self.num_experts = config.num_local_experts
        self.top_k = config.num_experts_per_tok
        self.jitter = config.router_jitter_noise
        self.per_sequence = config.router_aux_loss_scope == "sequence"
        self.step = 0
        self.last = False
        self.parts: SequenceParts | None = None
        self.left_out: int | None = None  # an expert that no token is to have
        self.allowed_BE: Tensor | None = None  # those that the tokens of each sequence may have in training; all
        self.low_rank: tuple[float, float] | None = None  # scale and dropout of adapters
        for name, shape in self.settings.parameter_shapes(config).items():
            module, _, leaf = name.rpartition(".")
            if module:
                assert leaf == "weight", f"{name} is no linear map's"
                self.add_module(module, Linear(shape[1], shape[0]))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        for name, shape in self.settings.buffer_shapes(config).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    @abstractmethod
    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Routing | WeightMixture:
        """The routing of hidden states (B, S, D), of which those where `mask_BS` (bool) holds are no padding."""

    @classmethod
    def losses(cls, settings: RouterSettings) -> list[RouterLoss]:
        """Beside the balance and the z-loss."""
        return entropy_losses(settings)

    def feedback(self, statistics: RoutingStatistics, losses: TokenLosses) -> RoutingStatistics:
        """The statistics with what the tokens' losses add to `own_X`, with gradient through what was handed on."""
        return statistics

    def after_step(self, total: RoutingStatistics) -> None:
        """Change buffers after an optimizer step. `total`: this layer's statistics of the whole step, without
        gradient, the same on every rank."""

    # what subclasses build on

    def whole(self, x_BSX: Tensor) -> Tensor:
        """All positions of each sequence, without gradient where they are spread over ranks."""
        return whole(self.parts, x_BSX)

    def own(self, x_BSX: Tensor) -> Tensor:
        """Of all positions those that are here."""
        return own(self.parts, x_BSX)

    def input(self, x_BSD: Tensor) -> Tensor:
        """The hidden states as the router sees them, (T, D).

        With `router_jitter_noise` x and in training they (not the experts' input) are multiplied by
        uniform(1 - x, 1 + x), as in Switch Transformers (Fedus et al. 2021, section 2.4).
        """
        x_TD = x_BSD.flatten(0, 1)
        if self.training and self.jitter:
            noise_TD = torch.empty_like(x_TD, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
            x_TD = x_TD.float() * noise_TD
        return x_TD

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Their map by `weight`, and by `bias` where the router has one, (T, E)."""
        logits_TE = self.linear(self.input(x_BSD), "weight")
        bias_E = getattr(self, "bias", None)
        return self.without_closed(logits_TE if bias_E is None else logits_TE + bias_E.float())

    def without_closed(self, logits_TE: Tensor) -> Tensor:
        """The same but for the experts that tokens are not to have."""
        closed_TE = self.closed(logits_TE)
        return logits_TE if closed_TE is None else logits_TE.masked_fill(closed_TE, torch.finfo(torch.float32).min / 4)

    def closed(self, scores_TE: Tensor) -> Tensor | None:
        """Which experts which tokens are not to have, bool, of the scores' shape or one that expands to it; None: none."""
        if self.left_out is not None:
            return torch.arange(self.num_experts, device=scores_TE.device) == self.left_out
        if self.allowed_BE is None or not self.training:
            return None
        return (~self.allowed_BE).repeat_interleave(len(scores_TE) // len(self.allowed_BE), 0)

    def log_probabilities(self, logits_TE: Tensor) -> Tensor:
        """Of the experts, as the router shares its scores out, (T, E)."""
        return logits_TE.log_softmax(-1)

    def linear(self, x_TD: Tensor, name: str) -> Tensor:
        """The linear map by a parameter, in fp32 whatever the model's dtype, and by its low-rank factors."""
        out_TE = wide_linear(x_TD, getattr(self, name))
        if self.low_rank is None or not hasattr(self, f"{name}_lora_A"):
            return out_TE
        scale, dropout = self.low_rank
        dropped_TD = torch.nn.functional.dropout(x_TD, dropout, self.training)
        low_TR = wide_linear(dropped_TD, getattr(self, f"{name}_lora_A"))
        return out_TE + wide_linear(low_TR, getattr(self, f"{name}_lora_B")) * scale

    def adapt(self, name: str, rank: int, scale: float, dropout: float) -> None:
        """Give a parameter low-rank factors, as `NAME_lora_A` and `NAME_lora_B`, uninitialised."""
        rows, columns = getattr(self, name).shape
        for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            self.register_parameter(f"{name}_lora_{factor}", nn.Parameter(torch.empty(shape)))
        self.low_rank = scale, dropout

    def statistics(
        self, logits_TE: Tensor, probability_TE: Tensor, expert_TR: Tensor, mask_BS: Tensor, **more: Any
    ) -> RoutingStatistics:
        """`router_statistics` as the configuration asks for them."""
        settings = self.settings
        return router_statistics(
            logits_TE,
            probability_TE,
            expert_TR,
            mask_BS,
            per_sequence=self.per_sequence,
            entropy_gradient=bool(settings.entropy_bonus_coef or settings.local_entropy_coef),
            parts=self.parts,
            **more,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves and casts, of which buffers follow the moves alone."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


def rows_by_token(
    expert_TR: Tensor, weight_TR: Tensor, num_experts: int, taken_TR: Tensor | None = None
) -> dict[str, Any]:
    """The rows of a `Routing` from each token's choices of experts and their weights.

    taken_TR: bool, which choices become rows; None: all. With it, the number of rows is asked of the device.
    """
    if taken_TR is None:
        token_index_N, order_N, slot_TK, counts_E = sort_by_expert(expert_TR, num_experts)
        weight_N = weight_TR.flatten()[order_N]
        return {"token_index_N": token_index_N, "weight_N": weight_N, "counts_E": counts_E, "slot_TK": slot_TK}
    # What is not taken sorts behind the last expert and is cut off there.
    token_index_N, order_N, _, counts = sort_by_expert(expert_TR.masked_fill(~taken_TR, num_experts), num_experts + 1)
    rows = int(host.read(taken_TR.sum(), "rows of all tokens", taken_TR.numel()))
    return {
        "token_index_N": token_index_N[:rows],
        "weight_N": weight_TR.flatten()[order_N[:rows]],
        "counts_E": counts[:-1],
        "slot_TK": None,
    }

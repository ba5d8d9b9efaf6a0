"""What every router is built on, and those are in which each token takes the best of its experts, as far as these have
room. One file each in `routers/`.

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
from moe_llm.config.routers import LimitedSettings, RouterSettings
from moe_llm.model.layers import Linear
from moe_llm.model.moe.capacity import Groups, assign_by_choice, assign_by_position
from moe_llm.model.moe.feedback import TokenLosses
from moe_llm.model.moe.losses import RouterLoss, entropy_losses
from moe_llm.model.moe.routing import Routing, RoutingStatistics, WeightMixture, router_statistics
from moe_llm.model.sequence_parts import SequenceParts, own, whole
from moe_llm.ops import compiled, host
from moe_llm.ops.permutation import sort_by_expert
from moe_llm.ops.products import wide_linear
from moe_llm.ops.routing_decision import decided


class Router(nn.Module, ABC):
    """Base of all routers. A subclass names its settings, writes `forward`, and may have losses and an update.

    Parameters and buffers are those that the settings name; `NAME.weight` is that of a linear map `NAME`. Parameters
    begin with normal weights of deviation `initializer_range`, but for those in `zero_parameters` and `gains`, and
    vectors with ones; buffers with zero. Buffers stay fp32 whatever the model's dtype.

    gains: name -> gain of maps that begin with Glorot's deviation, gain * sqrt(2 / (rows + columns)).

    by_document: `forward` takes the documents' ids (B, S) too, None where they are not isolated.

    A router whose settings have `learns_from_loss` hands something on while training (`RoutingStatistics.feedback_TX`) of
    which `feedback` makes sums, once the tokens' losses are known. last: whether this is the last layer's.

    relative_sizes: widths of the experts over their mean.

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
        sizes = config.expert_sizes or (1,) * config.num_local_experts
        self.relative_sizes = tuple(size * len(sizes) / sum(sizes) for size in sizes)
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
        """The statistics with what the tokens' losses add to `extra_X`, with gradient through what was handed on."""
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
        form = compiled.region(router_statistics) if compiled.on else router_statistics
        return form(
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


def routers_of(model: nn.Module) -> list[Router]:
    """Of each layer, in order."""
    return [module for module in model.modules() if isinstance(module, Router)]


def begin_step(model: nn.Module, step: int) -> None:
    """Tell the routers which optimizer step is computed next, counted from 0."""
    for router in routers_of(model):
        router.step = step


def end_step(model: nn.Module, total: RoutingStatistics) -> None:
    """Let the routers that are trained change their buffers.

    total: of the step, over ranks and micro-batches, stacked over the layers, without gradient.
    """
    for router, layer in zip(routers_of(model), total.layers(), strict=True):
        if any(parameter.requires_grad for parameter in router.parameters()):
            router.after_step(layer)


class TokenChoiceRouter(Router):
    """Softmax over the experts, of which a token takes the top k.

    With `router.capacity_factor`, and in training, an expert takes a limited number of tokens from each document
    or sequence (see `capacity`), and padding gets no expert; in evaluation none is dropped, so that the model computes what its
    export does. With `router.overflow: residual` the token itself stands in for experts that had no room, times their
    weights; with `router.overflow: queue` the same experts take it in a second round. With `router.warmup_steps`, tokens are drawn in training that take experts at random instead.

    What a subclass may say otherwise: `preferred`, `weights`, `wanted` and `assign`.
    """

    settings: LimitedSettings
    by_document = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.limited = self.settings.limited

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, document_BS: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_BSD)
        return self.route(logits_TE, logits_TE.softmax(-1), self.groups(mask_BS, document_BS))

    def groups(self, mask_BS: Tensor, document_BS: Tensor | None) -> Groups:
        """The tokens that share room, where room is limited at all."""
        if not (self.training and self.limited):
            return Groups(mask_BS, mask_BS, mask_BS)  # nothing asks where groups begin or how large they are
        return Groups.of(self.whole(mask_BS), None if document_BS is None else self.whole(document_BS))

    def weights(self, value_TR: Tensor, shared_TR: Tensor) -> Tensor:
        """What outputs are multiplied by. value_TR: probabilities of the choices; shared_TR: the same, zero for choices
        that were passed on."""
        return value_TR / shared_TR.sum(-1, keepdim=True).clamp(min=torch.finfo(value_TR.dtype).tiny)

    def wanted(self, value_TR: Tensor) -> Tensor | None:
        """Which choices a token proposes at all, bool; None: each."""
        return None

    def assign(
        self, expert_TR: Tensor, value_TR: Tensor, wanted_TR: Tensor | None, groups: Groups, capacity_BS: Tensor
    ) -> Tensor:
        """Which choices are granted, bool (T, R): earlier positions come first."""
        shape = (*groups.mask_BS.shape, expert_TR.shape[-1])
        wanted_BSR = None if wanted_TR is None else wanted_TR.view(shape)
        serve = assign_by_position if self.settings.capacity_order == "position" else assign_by_choice
        granted_BSR = serve(expert_TR.view(shape), groups, self.top_k, self.num_experts, capacity_BS, wanted_BSR)
        return granted_BSR.flatten(0, 1)

    def route(
        self,
        logits_TE: Tensor,
        probability_TE: Tensor,
        groups: Groups,
        measure: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Routing:
        """The routing that follows from probabilities. `measure`, given the top k experts and their weights (T, K), whoever
        gets the room, forms the sums that the router's own losses need."""
        factor = self.settings.capacity_at(self.step) if self.training and self.limited else None
        mask_BS = groups.mask_BS if factor is None else self.own(groups.mask_BS)
        overflow = getattr(self.settings, "overflow", "drop") if factor is not None else None
        pass_on = overflow == "next"
        expert_TR = self.preferred(probability_TE, self.num_experts if pass_on else self.top_k)
        value_TR = probability_TE.gather(-1, expert_TR)
        chosen_TK = value_TR[:, : self.top_k]
        wanted_TR = self.wanted(value_TR)
        if pass_on and self.allowed_BE is not None:  # nothing is passed on to experts that the token is not to have
            open_TR = value_TR > 0
            wanted_TR = open_TR if wanted_TR is None else wanted_TR & open_TR
        granted_TR, dropped, kept_R, queued_TR, served_TR = wanted_TR, None, None, None, None
        if factor is not None:
            capacity_BS = groups.capacity(factor, self.top_k, self.num_experts)
            granted_TR = decided(self._assigned(expert_TR, value_TR, wanted_TR, groups, capacity_BS))
            if overflow == "queue":
                first_TR, deeper = granted_TR, factor + (getattr(self.settings, "queue_depth", None) or 0.0)
                capacity_BS = groups.capacity(deeper, self.top_k, self.num_experts)
                granted_TR = first_TR | decided(self._assigned(expert_TR, value_TR, wanted_TR, groups, capacity_BS))
                queued_TR, served_TR = granted_TR & ~first_TR, first_TR
            asked = (
                mask_BS.sum() * self.top_k
                if wanted_TR is None
                else (wanted_TR[:, : self.top_k] & mask_BS.flatten()[:, None]).sum()
            )
            dropped = asked - granted_TR.sum()
        weight_TR = self.weights(value_TR, value_TR if granted_TR is None or not pass_on else value_TR * granted_TR)
        if overflow == "residual":
            assert granted_TR is not None, "only a limit overflows"
            denied_TR = mask_BS.flatten()[:, None] & ~granted_TR
            denied_TR = denied_TR if wanted_TR is None else denied_TR & wanted_TR
            kept_R = (weight_TR * denied_TR).sum(-1)
        routing = Routing(
            **rows_by_token(expert_TR, weight_TR, self.num_experts, granted_TR if served_TR is None else served_TR),
            logits_TE=logits_TE,
            statistics=self.statistics(
                logits_TE,
                probability_TE,
                expert_TR[:, : self.top_k],
                mask_BS,
                dropped=dropped,
                taken_TK=None if wanted_TR is None else wanted_TR[:, : self.top_k],
                extra_X=None
                if measure is None
                else measure(expert_TR[:, : self.top_k], self.weights(chosen_TK, chosen_TK)),
            ),
            kept_R=kept_R,
        )
        if queued_TR is None:
            return routing
        queued = routing._replace(**rows_by_token(expert_TR, weight_TR, self.num_experts, queued_TR))
        return routing._replace(queued=queued)

    def _assigned(
        self, expert_TR: Tensor, value_TR: Tensor, wanted_TR: Tensor | None, groups: Groups, capacity_BS: Tensor
    ) -> Tensor:
        """`assign` for whole sequences, of which the tokens that are here take their part."""
        if self.parts is None:
            return self.assign(expert_TR, value_TR, wanted_TR, groups, capacity_BS)

        def whole(x_TR: Tensor) -> Tensor:
            return self.whole(x_TR.unflatten(0, (len(groups.mask_BS), -1))).flatten(0, 1)

        wanted_TR = None if wanted_TR is None else whole(wanted_TR)
        granted_TR = self.assign(whole(expert_TR), whole(value_TR.detach()), wanted_TR, groups, capacity_BS)
        return self.own(granted_TR.unflatten(0, groups.mask_BS.shape)).flatten(0, 1)

    def preferred(self, probability_TE: Tensor, choices: int) -> Tensor:
        """A token's best experts, (T, choices)."""
        if self.training and self.step < self.settings.warmup_steps:
            drawn_T = torch.rand(len(probability_TE), device=probability_TE.device)
            learned_T = decided(drawn_T < self.step / self.settings.warmup_steps)
            random_TE = torch.rand_like(probability_TE).masked_fill(probability_TE == 0, -1.0)  # closed ones stay so
            probability_TE = torch.where(learned_T[:, None], probability_TE, random_TE)
        return probability_TE.topk(choices, dim=-1).indices


def close_groups(score_TE: Tensor, score_TG: Tensor, allowed: int) -> Tensor:
    """The scores of experts, minus infinity but for those of each token's `allowed` best groups of neighbours."""
    best_TP = score_TG.topk(allowed, dim=-1).indices
    closed_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(-1, best_TP, False)
    return score_TE.unflatten(-1, (score_TG.shape[-1], -1)).masked_fill(closed_TG[..., None], float("-inf")).flatten(1)

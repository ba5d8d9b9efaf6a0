"""transformers' own models on the same batches: losses and gradients of a step that share no code with the package.

Documents go through the model one by one, as rows of their own, so that neither packing nor its mask is needed; the
losses of routers come from `router_losses`, as functions of sums over the real tokens of the step. Everything in fp32.
Dimensions: B documents, S longest of them, T real tokens, E experts, L layers.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from moe_llm.config import ModelConfig
from moe_llm.doctor.oracle.buffers import lowest_taken, move_buffers
from moe_llm.doctor.oracle.choices import Choice, of_logits, score_shares, spread, top_of_softmax
from moe_llm.doctor.oracle.documents import documents_of
from moe_llm.doctor.oracle.family import (
    Stored,
    comparable,
    family_config,
    gates_of,
    has_own_layers,
    named_as_ours,
    with_blocks,
)
from moe_llm.doctor.oracle.router_losses import (
    Routed,
    Seen,
    Sums,
    added,
    balance_part,
    balance_part_by_sequence,
    balance_pooled,
    own_losses,
    values_of,
    z_loss_part,
)
from moe_llm.doctor.oracle.token_losses import expectation_maximisation, policy

if TYPE_CHECKING:
    from moe_llm.data.packing import Batch


@dataclass(frozen=True)
class Expected:
    """A step's losses, those of the router's own by name, and the gradient of their weighted sum by parameter name.
    unsure: parameters whose gradient is not unique, because a loss looks at a border between experts that are tied.
    buffers: those of routers after the step, by name."""

    lm: float
    aux: float
    z: float
    gradients: dict[str, np.ndarray]
    own: dict[str, float] = field(default_factory=dict)
    unsure: frozenset[str] = frozenset()
    buffers: dict[str, np.ndarray] = field(default_factory=dict)


class Reference:
    """transformers' model of the same shape. Construct once, then `step` with the weights before each step, in turn: the
    routers' buffers are those of the first step, moved by their own rules from there.

    moves: whether the routers are trained.
    """

    def __init__(self, config: ModelConfig, moves: bool = True):
        from transformers import AutoModelForCausalLM

        assert comparable(config), f"transformers has no decoder for model.router.type={config.router.type}"
        self.config, self.own, self.moves = config, own_losses(config.router), moves
        # The plain loop over experts takes any width; grouped products want multiples of 16 bytes.
        model = AutoModelForCausalLM.from_config(family_config(config), experts_implementation="eager")
        self.blocks = [] if has_own_layers(config) else with_blocks(model, config)
        self.model = model.float().eval()
        self.stored = named_as_ours(self.model)
        self.noise_weights: list[torch.nn.Parameter] = []
        gates = [] if self.blocks else gates_of(self.model)
        if config.router.type == "noisy_top_k" and not self.blocks:
            shape = (config.num_local_experts, config.hidden_size)
            self.noise_weights = [torch.nn.Parameter(torch.zeros(shape)) for _ in gates]
            for layer, weight in zip(config.moe_layers, self.noise_weights, strict=True):
                self.stored[f"model.layers.{layer}.mlp.gate.noise_weight"] = Stored(weight)
        self.begun = False
        self._seen: list[Choice] = []
        self._sizes: list[int] = []
        self._inputs: list[torch.Tensor] = []
        self._stream_BSD: torch.Tensor | None = None
        for number, gate in enumerate(gates):
            gate.register_forward_hook(functools.partial(self._gate, number))
        for block in self.blocks:
            block.register_forward_pre_hook(lambda module, inputs: self._inputs.append(inputs[0]))
        self.model.model.norm.register_forward_pre_hook(self._keep_stream)

    def _keep_stream(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._stream_BSD = inputs[0]

    def _gate(
        self, number: int, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: tuple
    ) -> tuple | None:
        """Writes down what transformers' router made of its tokens; where the router's paper has another choice or other
        weights, these take their place."""
        top_k, router = self.config.num_experts_per_tok, cast(Any, self.config.router)
        logits_TE, weight_TK, expert_TK = output
        if router.type in ("mixtral", "bias_balanced") or self.model.config.model_type == "deepseek_v2":
            kind = router.score if router.type == "bias_balanced" else "softmax"
            self._seen.append(spread(score_shares(logits_TE, kind)[1], expert_TK, weight_TK, logits_TE))
            return None
        deviation_TE = None
        if self.noise_weights:
            deviation_TE = F.softplus(F.linear(inputs[0].flatten(0, -2), self.noise_weights[number]))
        self._seen.append(of_logits(logits_TE, top_k, router, deviation_TE))
        expert_TK, weight_TK, _ = top_of_softmax(logits_TE, top_k, router)
        return logits_TE, weight_TK, expert_TK

    def step(self, weights: Mapping[str, np.ndarray], rounds: Sequence["Batch"]) -> Expected:
        """What one optimizer step should see, whose rounds of micro-batches are these.

        Args:
            weights: whole tensors, by the names that transformers gives them too.
        """
        self._load(weights)
        for parameter in [*self.model.parameters(), *self.noise_weights]:
            parameter.grad = None
        sums, own_values, seen = torch.zeros(3), torch.zeros(len(self.own)), Seen()
        for parts in self._rounds(rounds, seen):
            (parts @ self._coefficients()).backward()
            sums += parts[:3].detach()
            own_values = parts[3:].detach()  # those of all that has been seen
        gradients, (lm, aux, z) = {n: _gradient(stored) for n, stored in self.stored.items()}, sums.tolist()
        if self.moves:
            with torch.no_grad():
                assert seen.own is not None
                move_buffers(self.config, self._buffers(), seen.own, seen.lowest)
        return Expected(
            lm,
            aux,
            z,
            {name: gradient for name, gradient in gradients.items() if gradient is not None},
            {loss.name: value for loss, value in zip(self.own, own_values.tolist())},
            frozenset(name for name in gradients if seen.tied and ".mlp.gate." in name),
            {name: buffer.numpy().copy() for name, buffer in self._buffers().items()},
        )

    def _rounds(self, rounds: Sequence["Batch"], seen: "Seen") -> Iterator[torch.Tensor]:
        """Each round's share of the step's losses: cross-entropy, balance, z and the router's own."""
        parts_per_token = self.config.router.parts_per_token
        targets = sum(int((batch.labels_BS != -100).sum()) for batch in rounds)
        tokens = sum(int(batch.attention_mask_BS.sum()) for batch in rounds) * parts_per_token
        rows = sum(int(batch.attention_mask_BS.any(1).sum()) for batch in rounds)
        whole_step = self.config.balance_over == "step"
        if whole_step:
            with torch.no_grad():
                parts = [self._forward(batch)[1] for batch in rounds]
            seen.chosen = [part.chosen_LTE for part in parts]
            for part in parts:
                seen.own = added(seen.own, Sums.of(part))
        for batch in rounds:
            loss_sum, part = self._forward(batch)
            seen.lowest += lowest_taken(self.config, part, self._sizes)
            seen.tied |= part.load_LTE is not None and part.tied(self.config.num_experts_per_tok)
            if not whole_step:
                seen.chosen.append(part.chosen_LTE)
                seen.own = added(seen.own, Sums.of(part))
            assert seen.own is not None
            z = z_loss_part(part, tokens)
            aux = self._balance(part, torch.cat(seen.chosen, 1), tokens, rows, len(rounds))
            own = values_of(self.own, part, seen.own, tokens) if self.own else loss_sum.new_zeros(0)
            yield torch.cat([torch.stack([loss_sum / targets, aux, z]), own])

    def _coefficients(self) -> torch.Tensor:
        """Of the losses in the order of `_rounds`."""
        aux, z = self.config.router_aux_loss_coef, self.config.router_z_loss_coef
        return torch.tensor([1.0, aux, z, *(loss.coefficient for loss in self.own)])

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Of routers, in the order of the layers."""
        return {
            name: stored.tensor
            for name, stored in self.stored.items()
            if not isinstance(stored.tensor, torch.nn.Parameter)
        }

    @torch.no_grad()
    def _load(self, weights: Mapping[str, np.ndarray]) -> None:
        assert self.stored.keys() == weights.keys(), self.stored.keys() ^ weights.keys()
        for name, stored in self.stored.items():
            if isinstance(stored.tensor, torch.nn.Parameter) or not self.begun:
                stored.tensor.copy_(stored.as_theirs(torch.from_numpy(weights[name])))
        self.begun = True

    def _forward(self, batch: "Batch") -> tuple[torch.Tensor, Routed]:
        """Cross-entropy summed over the targets of one round, and what the routers made of its real tokens."""
        ids_BS, labels_BS, mask_BS, row_B = documents_of(batch)
        self._seen, self._inputs, self._sizes = [], [], mask_BS.sum(1).tolist()
        for block in self.blocks:
            block.real_BS = mask_BS
        output = self.model(ids_BS, attention_mask=mask_BS.long(), use_cache=False)
        nll_BS = F.cross_entropy(output.logits.transpose(1, 2), labels_BS, ignore_index=-100, reduction="none")
        row_T = row_B[:, None].expand_as(mask_BS)[mask_BS].repeat_interleave(self.config.router.parts_per_token)
        if self.blocks:
            layers = [block.choice for block in self.blocks if block.choice is not None]
        else:
            layers = [seen.of(mask_BS.flatten()) for seen in self._seen]
        return nll_BS.sum(), Routed.of(layers, row_T, self._from_token_losses(layers, nll_BS, labels_BS, mask_BS))

    def _from_token_losses(
        self, layers: list[Choice], nll_BS: torch.Tensor, labels_BS: torch.Tensor, mask_BS: torch.Tensor
    ) -> torch.Tensor | None:
        """Sums (L, X) of what routers make of the tokens' own losses; None of those that make nothing of them."""
        labels_T = labels_BS[mask_BS]
        if self.config.router.type == "reinforce":
            inputs = [x_BSD[mask_BS] for x_BSD in self._inputs]
            return policy(self.blocks, inputs, nll_BS[mask_BS], labels_T != -100, self._sizes)
        if self.config.router.type == "em":
            assert self._stream_BSD is not None
            model, stream_TD = self.model, self._stream_BSD[mask_BS]

            def logits_of(x_TD: torch.Tensor) -> torch.Tensor:
                return model.lm_head(model.model.norm(x_TD))

            return expectation_maximisation(self.blocks, stream_TD, labels_T, logits_of)
        if getattr(self.config.router, "loss_share", 0.0):  # how much loss the tokens of each expert have
            return torch.stack([nll_BS[mask_BS].detach() @ layer.chosen_TE for layer in layers])
        return None

    def _balance(self, part: Routed, seen_LTE: torch.Tensor, tokens: int, rows: int, rounds: int) -> torch.Tensor:
        """A round's summand of the step's balance loss.

        Args:
            seen_LTE: the choices of the step's rounds up to this one (Qiu et al. 2025), or of all of them.
            tokens, rows, rounds: of the whole step.
        """
        scope = self.config.router_aux_loss_scope
        if scope == "transformers":
            return balance_pooled(part) / rounds
        if scope == "sequence":
            return balance_part_by_sequence(part, rows)
        return balance_part(part, seen_LTE, tokens)


def _gradient(stored: Stored) -> np.ndarray | None:
    """Of a parameter, as ours lies in memory; None of a buffer."""
    if not isinstance(stored.tensor, torch.nn.Parameter):
        return None
    gradient = torch.zeros_like(stored.tensor) if stored.tensor.grad is None else stored.tensor.grad
    return stored.as_ours(gradient).contiguous().numpy().copy()

"""transformers' own models on the same batches: losses and gradients of a step that share no code with the package.

Documents go through the model one by one, as rows of their own, so that neither packing nor its mask is needed; the
losses of routers come from `router_losses`, as functions of sums over the real tokens of the step. Everything in fp32.
Dimensions: B documents, S longest of them, T real tokens, E experts, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from moe_llm.config import ModelConfig
from moe_llm.doctor.oracle.family import comparable, family_config, gates_of, named_as_ours
from moe_llm.doctor.oracle.router_losses import (
    Routed,
    Sums,
    balance_part,
    balance_part_by_sequence,
    balance_pooled,
    choice,
    own_losses,
    routed,
    z_loss_part,
)

if TYPE_CHECKING:
    from moe_llm.data.packing import Batch


@dataclass(frozen=True)
class Expected:
    """A step's losses, those of the router's own by name, and the gradient of their weighted sum by parameter name.
    unsure: parameters whose gradient is not unique, because a loss looks at a border between experts that are tied."""

    lm: float
    aux: float
    z: float
    gradients: dict[str, np.ndarray]
    own: dict[str, float] = field(default_factory=dict)
    unsure: frozenset[str] = frozenset()


class Reference:
    """transformers' model of the same shape. Construct once, then `step` with any weights."""

    def __init__(self, config: ModelConfig):
        from transformers import AutoModelForCausalLM

        assert comparable(config), f"transformers has no model of model.router.type={config.router.type}"
        self.config, self.own = config, own_losses(config.router)
        # The plain loop over experts takes any width; grouped products want multiples of 16 bytes.
        model = AutoModelForCausalLM.from_config(family_config(config), experts_implementation="eager")
        self.model = model.float().eval()
        self.parameters = named_as_ours(self.model, config)
        self.gates = gates_of(self.model)
        self.noise_weights: list[torch.nn.Parameter] = []
        if config.router.type == "noisy_top_k":
            shape = (config.num_local_experts, config.hidden_size)
            self.noise_weights = [torch.nn.Parameter(torch.zeros(shape)) for _ in self.gates]
            for layer, weight in enumerate(self.noise_weights):
                self.parameters[f"model.layers.{layer}.mlp.gate.noise_weight"] = weight
        self._inputs: list[torch.Tensor] = []
        for gate in self.gates:
            gate.register_forward_hook(self._gate)

    def _gate(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: tuple) -> tuple | None:
        """The choice and the weights that the router's paper gives, in the place of the model's, from its logits."""
        self._inputs.append(inputs[0].flatten(0, -2))
        if self.config.router.type == "mixtral":
            return None  # transformers' own
        logits_TE = output[0]
        expert_TK, weight_TK, _ = choice(logits_TE, self.config.num_experts_per_tok, self.config.router)
        return logits_TE, weight_TK, expert_TK

    def step(self, weights: Mapping[str, np.ndarray], rounds: Sequence["Batch"]) -> Expected:
        """What one optimizer step should see, whose rounds of micro-batches are these.

        Args:
            weights: whole tensors, by the names that transformers gives them too.
        """
        self._load(weights)
        for parameter in [*self.model.parameters(), *self.noise_weights]:
            parameter.grad = None
        targets = sum(int((batch.labels_BS != -100).sum()) for batch in rounds)
        tokens = sum(int(batch.attention_mask_BS.sum()) for batch in rounds)
        rows = sum(int(batch.attention_mask_BS.any(1).sum()) for batch in rounds)
        sums, seen = torch.zeros(3), []
        own_values = torch.zeros(len(self.own))
        own_seen: Sums | None = None
        tied = False
        whole_step = self.config.balance_over == "step"
        if whole_step:
            with torch.no_grad():
                parts = [self._forward(batch)[1] for batch in rounds]
            seen = [part.chosen_LTE for part in parts]
            for part in parts:
                own_seen = _added(own_seen, Sums.of(part))
        for batch in rounds:
            loss_sum, part = self._forward(batch)
            tied |= part.load_LTE is not None and part.tied(self.config.num_experts_per_tok)
            if not whole_step:
                seen.append(part.chosen_LTE)
                own_seen = _added(own_seen, Sums.of(part))
            z = z_loss_part(part, tokens)
            aux = self._balance(part, torch.cat(seen, 1), tokens, rows, len(rounds))
            parts_3 = torch.stack([loss_sum / targets, aux, z])
            total = parts_3 @ torch.tensor([1.0, self.config.router_aux_loss_coef, self.config.router_z_loss_coef])
            sums += parts_3.detach()
            if self.own:
                assert own_seen is not None
                own = self._own(part, own_seen, tokens)
                total = total + own @ torch.tensor([loss.coefficient for loss in self.own])
                own_values = own.detach()  # those of all that has been seen
            total.backward()
        gradients = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy().copy()
            for name, p in self.parameters.items()
        }
        lm, aux, z = sums.tolist()
        return Expected(
            lm,
            aux,
            z,
            gradients,
            {loss.name: value for loss, value in zip(self.own, own_values.tolist())},
            frozenset(name for name in gradients if tied and ".mlp.gate." in name),
        )

    @torch.no_grad()
    def _load(self, weights: Mapping[str, np.ndarray]) -> None:
        assert self.parameters.keys() == weights.keys(), self.parameters.keys() ^ weights.keys()
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))

    def _forward(self, batch: "Batch") -> tuple[torch.Tensor, Routed]:
        """Cross-entropy summed over the targets of one round, and what the routers made of its real tokens."""
        ids_BS, labels_BS, mask_BS, row_B = documents_of(batch)
        self._inputs = []
        output = self.model(ids_BS, attention_mask=mask_BS.long(), output_router_logits=True, use_cache=False)
        loss_sum = F.cross_entropy(output.logits.flatten(0, 1), labels_BS.flatten(), ignore_index=-100, reduction="sum")
        real_T = mask_BS.flatten()
        logits_LTE = torch.stack([layer[real_T] for layer in output.router_logits]).float()
        row_T = row_B[:, None].expand_as(mask_BS)[mask_BS]
        deviation_LTE = None
        if self.noise_weights:
            noise = [F.softplus(F.linear(x_TD, weight)) for x_TD, weight in zip(self._inputs, self.noise_weights)]
            deviation_LTE = torch.stack([layer_TE[real_T] for layer_TE in noise])
        router = self.config.router
        return loss_sum, routed(logits_LTE, self.config.num_experts_per_tok, row_T, router, deviation_LTE)

    def _own(self, part: Routed, seen: Sums, tokens: int) -> torch.Tensor:
        """The router's own losses of the tokens that have been seen, scaled up to all `tokens`, with the gradient that
        these tokens have in it."""
        whole = seen.each(
            lambda all_, mine: all_ * tokens / seen.tokens + mine - mine.detach(), Sums.of(part), tokens=tokens
        )
        return torch.stack([loss.value(whole).mean() for loss in self.own])

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


def _added(seen: Sums | None, more: Sums) -> Sums:
    """Without gradient."""
    if seen is None:
        return more.each(lambda mine: mine.detach(), tokens=more.tokens)
    return seen.each(lambda all_, mine: all_ + mine.detach(), more, tokens=seen.tokens + more.tokens)


def documents_of(batch: "Batch") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The isolated documents of packed rows, or the rows where they are not isolated: (ids, labels, real), each
    padded on the right to (B, S), and the row that each came from."""
    pieces, rows = [], []
    for row in range(len(batch.input_ids_BS)):
        real_S = batch.attention_mask_BS[row]
        owners_BS = batch.document_ids_BS
        owner_S = torch.zeros_like(batch.labels_BS[row]) if owners_BS is None else owners_BS[row]
        for document in owner_S[real_S].unique():
            mine_S = real_S & (owner_S == document)
            pieces.append((batch.input_ids_BS[row][mine_S], batch.labels_BS[row][mine_S]))
            rows.append(row)
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BS = pad([ids for ids, _ in pieces], batch_first=True)
    labels_BS = pad([labels for _, labels in pieces], batch_first=True, padding_value=-100)
    mask_BS = pad([torch.ones_like(ids, dtype=torch.bool) for ids, _ in pieces], batch_first=True)
    return ids_BS, labels_BS, mask_BS, torch.tensor(rows)

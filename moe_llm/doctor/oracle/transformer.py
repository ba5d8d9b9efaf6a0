"""transformers' Mixtral on the same batches: losses and gradients of a step that share no code with the package.

Documents go through the model one by one, as rows of their own, so that neither packing nor its mask is needed; the
balance and z-loss come from `router_losses`, as means over the real tokens of the step. Everything in fp32.
Dimensions: B documents, S longest of them, T real tokens, E experts, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from moe_llm.config import ModelConfig
from moe_llm.doctor.oracle.router_losses import (
    Routed,
    balance_part,
    balance_part_by_sequence,
    balance_pooled,
    routed,
    z_loss_part,
)

if TYPE_CHECKING:
    from moe_llm.data.packing import Batch


@dataclass(frozen=True)
class Expected:
    """A step's losses, and the gradient of their weighted sum by parameter name."""

    lm: float
    aux: float
    z: float
    gradients: dict[str, np.ndarray]


class Reference:
    """transformers' model of the same shape. Construct once, then `step` with any weights."""

    def __init__(self, config: ModelConfig):
        from transformers import AutoModelForCausalLM

        self.config = config
        # The plain loop over experts takes any width; grouped products want multiples of 16 bytes.
        model = AutoModelForCausalLM.from_config(mixtral_config(config), experts_implementation="eager")
        self.model = model.float().eval()

    def step(self, weights: Mapping[str, np.ndarray], rounds: Sequence["Batch"]) -> Expected:
        """What one optimizer step should see, whose rounds of micro-batches are these.

        Args:
            weights: whole tensors, by the names that transformers gives them too.
        """
        self._load(weights)
        self.model.zero_grad()
        targets = sum(int((batch.labels_BS != -100).sum()) for batch in rounds)
        tokens = sum(int(batch.attention_mask_BS.sum()) for batch in rounds)
        rows = sum(int(batch.attention_mask_BS.any(1).sum()) for batch in rounds)
        sums, seen = torch.zeros(3), []
        whole_step = self.config.balance_over == "step"
        if whole_step:
            with torch.no_grad():
                seen = [self._forward(batch)[1].chosen_LTE for batch in rounds]
        for batch in rounds:
            loss_sum, part = self._forward(batch)
            seen += [] if whole_step else [part.chosen_LTE]
            z = z_loss_part(part, tokens)
            aux = self._balance(part, torch.cat(seen, 1), tokens, rows, len(rounds))
            parts = torch.stack([loss_sum / targets, aux, z])
            total = parts @ torch.tensor([1.0, self.config.router_aux_loss_coef, self.config.router_z_loss_coef])
            total.backward()
            sums += parts.detach()
        gradients = {name: p.grad.numpy().copy() for name, p in self.model.named_parameters()}
        lm, aux, z = sums.tolist()
        return Expected(lm, aux, z, gradients)

    @torch.no_grad()
    def _load(self, weights: Mapping[str, np.ndarray]) -> None:
        parameters = dict(self.model.named_parameters())
        assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))

    def _forward(self, batch: "Batch") -> tuple[torch.Tensor, Routed]:
        """Cross-entropy summed over the targets of one round, and what the routers made of its real tokens."""
        ids_BS, labels_BS, mask_BS, row_B = documents_of(batch)
        output = self.model(ids_BS, attention_mask=mask_BS.long(), output_router_logits=True, use_cache=False)
        loss_sum = F.cross_entropy(output.logits.flatten(0, 1), labels_BS.flatten(), ignore_index=-100, reduction="sum")
        logits_LTE = torch.stack([layer[mask_BS.flatten()] for layer in output.router_logits]).float()
        row_T = row_B[:, None].expand_as(mask_BS)[mask_BS]
        return loss_sum, routed(logits_LTE, self.config.num_experts_per_tok, row_T)

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


def mixtral_config(model: ModelConfig) -> Any:
    """transformers' configuration of the same model, by the names that it gives to things itself."""
    from transformers import MixtralConfig

    assert model.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
    return MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads or model.num_attention_heads,
        head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
        num_local_experts=model.num_local_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        max_position_embeddings=model.max_position_embeddings,
        sliding_window=model.sliding_window,
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_word_embeddings,
        rope_parameters={"rope_theta": model.rope_theta, **model.rope_parameters.content()},
        attention_dropout=0.0,
        hidden_act="silu",
    )


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

"""transformers' Mixtral on the same batches: losses and gradients of a step that share no code with the package.

Documents go through the model one by one, as rows of their own, so that neither packing nor its mask is needed; the
balance and z-loss are written out from the papers, as means over the real tokens of the step. Everything in fp32.
Dimensions: B documents, S longest of them, T real tokens, E experts, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from moe_llm.checkpoint.architectures import MIXTRAL, architecture_of
from moe_llm.checkpoint.hf import to_transformers_config
from moe_llm.config import ModelConfig
from moe_llm.data.packing import Batch
from moe_llm.model.moe.losses import entropy_losses
from moe_llm.model.moe.routers import router_losses


@dataclass(frozen=True)
class Expected:
    """A step's losses, and the gradient of their weighted sum by parameter name."""

    lm: float
    aux: float
    z: float
    gradients: dict[str, np.ndarray]


def comparable(config: ModelConfig) -> bool:
    """Whether transformers trains such a model, capacity and entropies set aside: routers that choose as Mixtral's does
    while nothing is random, and have no parameters or losses of their own."""
    own = {loss.name for loss in router_losses(config)} - {loss.name for loss in entropy_losses(config.router)}
    return architecture_of(config) == MIXTRAL and not own


class Reference:
    """transformers' model of the same shape. Construct once, then `step` with any weights."""

    def __init__(self, config: ModelConfig):
        from transformers import AutoModelForCausalLM, MixtralConfig

        content = to_transformers_config(config, bos_token_id=1, eos_token_id=2, dtype="fp32")
        self.config = config
        # The plain loop over experts takes any width; grouped products want multiples of 16 bytes.
        model = AutoModelForCausalLM.from_config(MixtralConfig(**content), experts_implementation="eager")
        self.model = model.float().eval()

    def step(self, weights: Mapping[str, np.ndarray], rounds: Sequence[Batch]) -> Expected:
        """What one optimizer step should see, whose rounds of micro-batches are these.

        Args:
            weights: whole tensors, by the names that transformers gives them too.
        """
        self._load(weights)
        self.model.zero_grad()
        targets, tokens = (sum(getattr(batch, name) for batch in rounds) for name in ("num_targets", "num_tokens"))
        rows = sum(int(batch.attention_mask_BS.any(1).sum()) for batch in rounds)
        sums, seen = torch.zeros(3), []
        for batch in rounds:
            loss_sum, routed = self._forward(batch)
            seen.append(routed.chosen_LTE)
            z = routed.logits_LTE.logsumexp(-1).square().sum(1).mean() / tokens
            aux = self._balance(routed, torch.cat(seen, 1), tokens, rows, len(rounds))
            parts = torch.stack([loss_sum / targets, aux, z])
            total = parts @ torch.tensor([1.0, self.config.router_aux_loss_coef, self.config.router_z_loss_coef])
            total.backward()
            sums += parts.detach()
        gradients = {name: p.grad.numpy().copy() for name, p in self.model.named_parameters()}
        return Expected(*sums.tolist(), gradients)

    @torch.no_grad()
    def _load(self, weights: Mapping[str, np.ndarray]) -> None:
        parameters = dict(self.model.named_parameters())
        assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, "_Routed"]:
        """Cross-entropy summed over the targets of one round, and what the routers made of its real tokens."""
        ids_BS, labels_BS, mask_BS, row_B = documents_of(batch)
        output = self.model(ids_BS, attention_mask=mask_BS.long(), output_router_logits=True, use_cache=False)
        loss_sum = F.cross_entropy(output.logits.flatten(0, 1), labels_BS.flatten(), ignore_index=-100, reduction="sum")
        logits_LTE = torch.stack([layer[mask_BS.flatten()] for layer in output.router_logits]).float()
        probability_LTE = logits_LTE.softmax(-1)
        chosen = probability_LTE.topk(self.config.num_experts_per_tok, dim=-1).indices
        chosen_LTE = F.one_hot(chosen, logits_LTE.shape[-1]).sum(2).float()
        row_T = row_B[:, None].expand_as(mask_BS)[mask_BS]
        return loss_sum, _Routed(logits_LTE, probability_LTE, chosen_LTE, row_T)

    def _balance(self, routed: "_Routed", seen_LTE: torch.Tensor, tokens: int, rows: int, rounds: int) -> torch.Tensor:
        """A round's summand of the step's balance loss, E * sum_e f_e P_e (Fedus et al. 2021, equations 4 to 6),
        top-k choices a token counted one each.

        Args:
            seen_LTE: the choices of the step's rounds up to this one (Qiu et al. 2025).
            tokens, rows, rounds: of the whole step.
        """
        chosen_LTE, probability_LTE = routed.chosen_LTE, routed.probability_LTE
        experts, scope = self.config.num_local_experts, self.config.router_aux_loss_scope
        if scope == "transformers":
            fraction_E, mean_E = chosen_LTE.mean((0, 1)), probability_LTE.mean((0, 1))
            return experts * (fraction_E * mean_E).sum() / rounds
        if scope == "sequence":
            products = [
                (chosen_LTE[:, mine].mean(1) * probability_LTE[:, mine].mean(1)).sum(-1).mean()
                for mine in (routed.row_T == row for row in routed.row_T.unique())
            ]
            return experts * torch.stack(products).sum() / rows
        mean_LE = probability_LTE.sum(1) / tokens
        return experts * (seen_LTE.mean(1) * mean_LE).sum(-1).mean()


class _Routed(NamedTuple):
    """What the routers made of a round's real tokens; chosen: 1 for each of a token's experts, else 0; row_T: the
    packed row that a token stood in."""

    logits_LTE: torch.Tensor
    probability_LTE: torch.Tensor
    chosen_LTE: torch.Tensor
    row_T: torch.Tensor


def documents_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The isolated documents of packed rows, or the rows where they are not isolated: (ids, labels, real), each
    padded on the right to (B, S), and the row that each came from."""
    pieces, rows = [], []
    for row in range(len(batch.input_ids_BS)):
        real_S = batch.attention_mask_BS[row]
        together = batch.document_ids_BS is None
        owner_S = torch.zeros_like(batch.labels_BS[row]) if together else batch.document_ids_BS[row]
        for document in owner_S[real_S].unique():
            mine_S = real_S & (owner_S == document)
            pieces.append((batch.input_ids_BS[row][mine_S], batch.labels_BS[row][mine_S]))
            rows.append(row)
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BS = pad([ids for ids, _ in pieces], batch_first=True)
    labels_BS = pad([labels for _, labels in pieces], batch_first=True, padding_value=-100)
    mask_BS = pad([torch.ones_like(ids, dtype=torch.bool) for ids, _ in pieces], batch_first=True)
    return ids_BS, labels_BS, mask_BS, torch.tensor(rows)

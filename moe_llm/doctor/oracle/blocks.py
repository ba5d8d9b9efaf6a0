"""Sparse feed-forward layers from the papers' formulas, in the place of transformers' own where it has none.

Documents are rows of real tokens, padded on the right. Dimensions: B documents, S longest of them, T real tokens, n of
one document, D hidden, W width of what experts take, I width of an expert, E experts, P slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_llm.config import ModelConfig
from moe_llm.doctor.oracle.choices import RULES, Choice


class Dense(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, hidden: int, width: int, pair: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.pair = pair  # as GPT-OSS's layer gives it

    def forward(self, x_BSD: torch.Tensor) -> Any:
        y_BSD = self.down_proj(F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))
        return (y_BSD, None) if self.pair else y_BSD


class Sparse(nn.Module):
    """A router and its experts, with shared experts where there are any.

    real_BS: bool, to be set before each pass. Afterwards choice is what the router made of the real tokens, and every_TED
    and mixed_TD the output of each expert alone and of the mixture, for the last layer of an EM router.
    """

    def __init__(self, config: ModelConfig, last: bool, pair: bool = False):
        super().__init__()
        self.config, self.pair = config, pair
        self.router: Any = config.router
        self.alone = last and config.router.type == "em"
        hidden, wide, width = config.hidden_size, config.expert_hidden_size, config.intermediate_size
        E = config.num_local_experts
        self.gate, self.experts = nn.Module(), nn.Module()
        for name, shape in config.router.parameter_shapes(config).items():
            _put(self.gate, name, nn.Parameter(torch.zeros(shape)))
        for name, shape in config.router.buffer_shapes(config).items():
            self.gate.register_buffer(name, torch.zeros(shape))
        shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": (E, 2 * width, wide), "down_proj": (E, wide, width)}
        if config.expert_bias:
            shapes |= {"gate_up_proj_bias": (E, 2 * width), "down_proj_bias": (E, wide)}
        for name, shape in shapes.items():
            self.experts.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.shared_experts = Dense(hidden, config.shared_width) if config.num_shared_experts else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if config.shared_expert_gate else None
        self.real_BS: torch.Tensor | None = None
        self.choice: Choice | None = None
        self.every_TED: torch.Tensor | None = None
        self.mixed_TD: torch.Tensor | None = None

    @property
    def gate_tensors(self) -> dict[str, torch.Tensor]:
        return dict([*self.gate.named_parameters(), *self.gate.named_buffers()])

    def forward(self, x_BSD: torch.Tensor) -> Any:
        assert self.real_BS is not None, "set before each pass"
        x_TD, sizes = x_BSD[self.real_BS], self.real_BS.sum(1).tolist()
        kind = {"soft_moe": self._slots, "lory": self._merged, "multi_head": self._parts}
        y_TD = kind.get(self.router.type, self._tokens)(x_TD, sizes)
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD)
            y_TD = y_TD + (
                shared_TD if self.shared_expert_gate is None else self.shared_expert_gate(x_TD).sigmoid() * shared_TD
            )
        y_BSD = torch.zeros_like(x_BSD).masked_scatter(self.real_BS[..., None], y_TD)
        return (y_BSD, None) if self.pair else y_BSD

    def expert(self, number: int, x_nW: torch.Tensor) -> torch.Tensor:
        own = {name: weight[number] for name, weight in self.experts.named_parameters()}
        return self._layer(x_nW, own)

    def _layer(self, x_nW: torch.Tensor, own: dict[str, torch.Tensor]) -> torch.Tensor:
        """SwiGLU, or where it is clamped gate * sigmoid(alpha gate) * (up + 1) (OpenAI 2025)."""
        gate_nI, up_nI = F.linear(x_nW, own["gate_up_proj"], own.get("gate_up_proj_bias")).chunk(2, -1)
        limit = self.config.swiglu_limit
        if limit is None:
            inner_nI = F.silu(gate_nI) * up_nI
        else:
            gate_nI, up_nI = gate_nI.clamp(max=limit), up_nI.clamp(-limit, limit)
            inner_nI = gate_nI * torch.sigmoid(self.config.swiglu_alpha * gate_nI) * (up_nI + 1)
        return F.linear(inner_nI, own["down_proj"], own.get("down_proj_bias"))

    def _mixed(self, x_TW: torch.Tensor, choice: Choice) -> torch.Tensor:
        y_TW = torch.zeros_like(x_TW)
        for number in range(self.config.num_local_experts):
            mine = choice.chosen_TE[:, number].nonzero()[:, 0]
            if len(mine):
                weighed_nW = choice.weight_TE[mine, number, None] * self.expert(number, x_TW[mine])
                y_TW = y_TW.index_add(0, mine, weighed_nW)
        return y_TW

    def _tokens(self, x_TD: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        top_k = self.config.num_experts_per_tok
        self.choice = RULES[self.router.type](x_TD, sizes, self.gate_tensors, top_k, self.router)
        if not self.alone:
            return self._mixed(x_TD, self.choice)
        every = [self.expert(number, x_TD) for number in range(self.config.num_local_experts)]
        every_TED = torch.stack(every, 1)
        mixed_TD = (self.choice.weight_TE.detach()[..., None] * every_TED).sum(1)
        self.every_TED, self.mixed_TD = every_TED, mixed_TD
        return mixed_TD

    def _parts(self, x_TD: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """merge(concat(moe(parts of head(x)))), a part routed like a token elsewhere (Wu et al. 2024, "Multi-Head
        Mixture-of-Experts", equations 2 to 6)."""
        heads, gate = self.router.heads, self.gate_tensors
        part_PW = F.linear(x_TD, gate["head_proj.weight"]).reshape(len(x_TD) * heads, -1)
        sizes = [size * heads for size in sizes]
        self.choice = RULES["multi_head"](part_PW, sizes, gate, self.config.num_experts_per_tok, self.router)
        return F.linear(self._mixed(part_PW, self.choice).view(len(x_TD), -1), gate["merge_proj.weight"])

    def _slots(self, x_TD: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Soft slots (Puigcerver et al. 2023, equations 1 to 3) that a segment forms and the next one reads."""
        length, each = self.router.segment_length, self.router.slots_per_expert
        gate, outputs, chosen = self.gate_tensors, [], []
        phi_PD = gate["weight"]
        if self.router.normalize:
            logits_TP = gate["scale"] * (F.normalize(x_TD, dim=-1) @ F.normalize(phi_PD, dim=-1).T)
        else:
            logits_TP = x_TD @ phi_PD.T
        for x_nD, logits_nP in zip(x_TD.split(list(sizes)), logits_TP.split(list(sizes))):
            parts, logits = x_nD.split(length), logits_nP.split(length)
            outputs.append(torch.zeros_like(parts[0]))
            for before_LD, before_LP, now_lP in zip(parts, logits, logits[1:]):
                slot_PD = before_LP.softmax(0).T @ before_LD
                made = [self.expert(e, slots_pD) for e, slots_pD in enumerate(slot_PD.split(each))]
                outputs.append(now_lP.softmax(-1) @ torch.cat(made))
            share = each * (len(parts) - 1) / len(x_nD)  # rows of each expert for a token of the document
            chosen.append(x_nD.new_full((len(x_nD), self.config.num_local_experts), share))
        logits_TE = logits_TP.unflatten(-1, (-1, each)).logsumexp(-1)
        probability_TE, chosen_TE = logits_TE.softmax(-1), torch.cat(chosen)
        z_T = logits_TP.logsumexp(-1).square()
        self.choice = Choice(probability_TE, chosen_TE, probability_TE, z_T, logits_TE)
        return torch.cat(outputs)

    def _merged(self, x_TD: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """One layer whose weights are sum_e p_e times expert e's, with p of the mean of the segment before (Zhong et al.
        2024, section 3.1), and of a document's first segment softmax(start)."""
        length, gate, outputs, logits = self.router.segment_length, self.gate_tensors, [], []
        for x_nD in x_TD.split(list(sizes)):
            asked_E = gate["start"]
            for x_lD in x_nD.split(length):
                p_E = asked_E.softmax(-1)
                own = {n: torch.einsum("e,e...->...", p_E, w) for n, w in self.experts.named_parameters()}
                outputs.append(self._layer(x_lD, own))
                logits.append(asked_E.expand(len(x_lD), -1))
                asked_E = F.linear(x_lD.mean(0), gate["weight"])
        logits_TE = torch.cat(logits)
        probability_TE = logits_TE.softmax(-1)
        z_T = logits_TE.logsumexp(-1).square()
        self.choice = Choice(probability_TE, probability_TE.detach(), probability_TE, z_T, logits_TE)
        return torch.cat(outputs)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Under a name with dots."""
    first, _, rest = name.partition(".")
    if rest:
        if not hasattr(module, first):
            module.add_module(first, nn.Module())
        _put(getattr(module, first), rest, parameter)
    else:
        module.register_parameter(name, parameter)

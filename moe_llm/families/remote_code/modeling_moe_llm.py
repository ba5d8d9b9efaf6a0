"""A mixture-of-experts language model trained with moe_llm, for transformers (5 or later): the decoder is Mixtral's,
but for how tokens choose their experts and for the experts that all tokens pass through.

This is the model as it is evaluated: noise, limits of capacity and losses of the routers belong to training.
Dimensions: B sequences, S positions, T = B * S tokens, D hidden, E experts, K experts per token, G groups of M experts,
P groups of a token, C segments of a sequence, A tokens of a sequence with those that the cache has; in soft slots N
segments that form slots, L tokens of one of them, R slots of each.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

try:
    from transformers import initialization as init
except ImportError as error:
    raise ImportError(
        f"this checkpoint's modelling code needs transformers 5.17 or newer, and {transformers.__version__} is installed: "
        "pip install -U transformers"
    ) from error
from transformers import DynamicCache, MixtralForCausalLM
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    OutputRecorder,
)

from .configuration_moe_llm import MoELLMConfig

RENORMALISED = ("mixtral", "dense", "gshard", "noisy_top_k", "attention", "transformer", "em")
AS_THEY_ARE = ("switch", "batch_prioritised")
EITHER = ("deepseek_moe", "multi_head")


class MoELLMRouter(nn.Module):
    """Logits (T, E), each token's experts and their weights, (T, K) both; a weight of zero is no choice."""

    def __init__(self, config: MoELLMConfig):
        super().__init__()
        self.settings = config.moe_llm["router"]
        self.seen: list[tuple[Tensor, Tensor]] | None = None  # while the balance loss is asked for
        self.kind, self.top_k = self.settings["type"], config.num_experts_per_tok
        experts, hidden = config.num_local_experts, config.hidden_size
        self.heads = self.settings.get("heads", 1)  # parts of a token that are routed apart
        rows = experts * self.settings.get("slots_per_expert", 1)
        width = {
            "attention": lambda: self.heads * self.settings["key_size"],
            "transformer": lambda: self.settings["width"],
        }.get(self.kind, lambda: hidden // self.heads)()
        self.weight = nn.Parameter(torch.empty(rows, width))
        if self.kind == "attention":
            self.query_weight = nn.Parameter(torch.empty(width, hidden))
        if self.kind == "transformer":
            self.input_weight = nn.Parameter(torch.empty(width, hidden))
            self.qkv_weight = nn.Parameter(torch.empty(3 * width, width))
            self.output_weight = nn.Parameter(torch.empty(width, width))
            self.up_weight = nn.Parameter(torch.empty(2 * width, width))
            self.down_weight = nn.Parameter(torch.empty(width, 2 * width))
            for name in ("attention_norm", "mlp_norm", "norm"):
                self.register_parameter(name, nn.Parameter(torch.ones(width)))
        if self.kind == "reinforce":  # of no use outside training
            if self.settings["baseline"] == "learned":
                self.baseline_weight = nn.Parameter(torch.zeros(1, hidden), requires_grad=False)
            if self.settings["load_coef"]:
                self.register_buffer("load", torch.zeros(experts, dtype=torch.float32))
        if self.kind == "multi_head":
            self.head_proj = nn.Linear(hidden, hidden, bias=False)
            self.merge_proj = nn.Linear(hidden, hidden, bias=False)
        if self.kind == "soft_moe" and self.settings["normalize"]:
            self.scale = nn.Parameter(torch.ones(1))
        if self.kind == "noisy_top_k":  # of no use outside training
            self.noise_weight = nn.Parameter(torch.zeros(experts, hidden), requires_grad=False)
        if self.kind == "hierarchical":
            self.group_weight = nn.Parameter(torch.empty(self.settings["groups"], hidden))
        if self.kind == "bias_balanced":
            self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        if self.kind == "lory":
            self.start = nn.Parameter(torch.zeros(experts))
        if self.kind == "expert_choice":
            self.register_buffer("threshold", torch.zeros(experts, dtype=torch.float32))

    def forward(
        self, x_TD: Tensor, position_T: Tensor, real_BA: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        routed = self._route(x_TD, position_T, real_BA)
        if self.seen is not None:
            self.seen.append(self._probability_and_choices(*routed))
        return routed

    def _probability_and_choices(
        self, logits_TE: Tensor, expert: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each token's distribution over experts, and how much of each expert it has, (T, E) both: of what the balance
        loss is made."""
        probability_TE = logits_TE.softmax(-1)
        if self.kind == "bias_balanced" and self.settings["score"] == "sigmoid":
            score_TE = logits_TE.sigmoid()
            probability_TE = score_TE / score_TE.sum(-1, keepdim=True)
        if self.kind in ("lory", "soft_moe"):  # of soft slots the block knows how many there are
            return probability_TE, probability_TE.detach()
        if self.kind == "dense":
            return probability_TE, torch.ones_like(probability_TE)
        taken_TK = torch.ones_like(weight)
        if self.kind in ("top_p", "expert_choice"):
            taken_TK = (weight != 0).to(logits_TE.dtype)
        return probability_TE, torch.zeros_like(logits_TE).scatter_add_(
            -1, expert, taken_TK.to(logits_TE.dtype)
        ).detach()

    def _route(
        self, x_TD: Tensor, position_T: Tensor, real_BA: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.kind == "lory":
            return self._by_segment(x_TD, position_T, real_BA)
        if self.kind == "soft_moe":  # logits of the slots instead of experts, and no weights
            x_TD, phi_RD = x_TD.float(), self.weight.float()
            if self.settings["normalize"]:
                x_TD, phi_RD = F.normalize(x_TD, dim=-1), self.scale.float() * F.normalize(phi_RD, dim=-1)
            logits_TR = F.linear(x_TD, phi_RD)
            return logits_TR.unflatten(-1, (-1, self.settings["slots_per_expert"])).logsumexp(-1), logits_TR, None
        if self.kind == "attention":
            query_THK, key_EHK = (
                part.float().unflatten(-1, (self.heads, -1))
                for part in (F.linear(x_TD.float(), self.query_weight.float()), self.weight)
            )
            scores_THE = torch.einsum("thk,ehk->the", query_THK, key_EHK)
            scores_THE = scores_THE / (key_EHK.shape[-1] ** 0.5 * self.settings["temperature"])
            logits_TE = scores_THE.softmax(-1).mean(1).log()
            return logits_TE, *self._choose(logits_TE, position_T)
        if self.kind == "transformer":
            x_TD = self._block(x_TD, position_T, real_BA)
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        if self.kind == "hierarchical":
            group_TG = F.linear(x_TD.float(), self.group_weight.float())
            within_TGM = logits_TE.unflatten(-1, (group_TG.shape[-1], -1))
            product_TE = (group_TG[..., None] + within_TGM.log_softmax(-1)).flatten(1)
            return product_TE, *self._by_group(within_TGM, group_TG)
        return logits_TE, *self._choose(logits_TE, position_T)

    def _choose(self, logits_TE: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "bias_balanced":
            return self._by_bias(logits_TE)
        if self.kind == "balanced":
            expert_TK = position_T[:, None] * self.top_k + torch.arange(self.top_k, device=position_T.device)
            expert_TK = expert_TK % logits_TE.shape[-1]
            return expert_TK, logits_TE.gather(-1, expert_TK).softmax(-1)
        if self.kind == "expert_choice":
            score_TE = logits_TE.softmax(-1)
            every_TE = torch.arange(score_TE.shape[-1], device=score_TE.device).expand_as(score_TE)
            return every_TE, score_TE * (score_TE >= self.threshold)
        weight_TK, expert_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        if self.kind == "reinforce":
            return expert_TK, torch.full_like(weight_TK, 1 / self.top_k)
        if self.kind == "top_p":
            taken_TK = weight_TK.cumsum(-1) - weight_TK < self.settings["p"]
            taken_TK[:, 0] = True
            return expert_TK, weight_TK * taken_TK
        if self.kind in RENORMALISED or (self.kind in EITHER and self.settings["norm_topk_prob"]):
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        elif self.kind not in AS_THEY_ARE + EITHER:
            raise ValueError(f"moe_llm.router.type={self.kind!r} of config.json is not known here: use a newer file")
        return expert_TK, weight_TK * self.settings.get("routed_scaling_factor", 1.0)

    def _by_bias(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        score_TE = logits_TE.sigmoid() if settings["score"] == "sigmoid" else logits_TE.softmax(-1)
        biased_TE = score_TE + self.e_score_correction_bias
        if settings["topk_group"] < settings["n_group"]:
            biased_TGM = biased_TE.unflatten(-1, (settings["n_group"], -1))
            best_TP = biased_TGM.topk(2, dim=-1).values.sum(-1).topk(settings["topk_group"], dim=-1).indices
            closed_TG = torch.ones_like(biased_TGM[..., 0], dtype=torch.bool).scatter(-1, best_TP, False)
            biased_TE = biased_TGM.masked_fill(closed_TG[..., None], float("-inf")).flatten(1)
        expert_TK = biased_TE.topk(self.top_k, dim=-1).indices
        weight_TK = score_TE.gather(-1, expert_TK)
        if settings["norm_topk_prob"]:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return expert_TK, weight_TK * settings["routed_scaling_factor"]

    def _block(self, x_TD: Tensor, position_T: Tensor, real_BA: Tensor) -> Tensor:
        """What the gate's own transformer block makes of the texts, which end where positions do not go on."""
        W, heads = self.weight.shape[1], self.settings["heads"]
        rms = lambda x, scale: F.rms_norm(x, (W,), scale.float(), 1e-6)  # noqa: E731
        h_BAW = F.linear(x_TD.float(), self.input_weight.float()).view(*real_BA.shape, W)
        position_BA, real_BA = position_T.view(real_BA.shape), real_BA.bool()
        number_BA = torch.zeros_like(position_BA)
        nth_BA = real_BA.cumsum(1)
        for number_A, position_A, real_A in zip(number_BA, position_BA, real_BA):
            ends = (position_A[real_A].diff(prepend=position_A[real_A][:1] - 1) != 1).cumsum(0)
            number_A[real_A] = ends
        gap_BAA = nth_BA[:, :, None] - nth_BA[:, None, :]
        seen_BAA = (number_BA[:, :, None] == number_BA[:, None, :]) & real_BA[:, None, :] & (gap_BAA >= 0)
        if self.settings["window"] is not None:
            seen_BAA &= gap_BAA < self.settings["window"]
        seen_BAA |= torch.eye(real_BA.shape[1], dtype=torch.bool, device=x_TD.device)
        qkv = F.linear(rms(h_BAW, self.attention_norm), self.qkv_weight.float()).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        attended_BAW = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BAA[:, None]).transpose(1, 2).flatten(2)
        h_BAW = h_BAW + F.linear(attended_BAW, self.output_weight.float())
        up = F.gelu(F.linear(rms(h_BAW, self.mlp_norm), self.up_weight.float()))
        return rms(h_BAW + F.linear(up, self.down_weight.float()), self.norm).flatten(0, 1)

    def _by_group(self, within_TGM: Tensor, group_TG: Tensor) -> tuple[Tensor, Tensor]:
        chosen, size = self.settings["groups_per_token"], within_TGM.shape[-1]
        gate_TP, group_TP = group_TG.topk(chosen, dim=-1)
        inside_TPM = within_TGM.gather(1, group_TP[..., None].expand(*group_TP.shape, size))
        inner_TPQ, place_TPQ = inside_TPM.topk(self.top_k // chosen, dim=-1)
        weight_TPQ = gate_TP.softmax(-1)[..., None] * inner_TPQ.softmax(-1)
        return (group_TP[..., None] * size + place_TPQ).flatten(1), weight_TPQ.flatten(1)

    def _by_segment(self, x_BAD: Tensor, position_T: Tensor, real_BA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E) of the new tokens, their segments (B, S), and each segment's mixture of the experts (B, C, E).
        Segments are counted in tokens that are no padding; a mixture is what the mean of the segment before asks for.
        """
        sequences, tokens = real_BA.shape
        new, length = len(position_T) // sequences, self.settings["segment_length"]
        segment_BA = (real_BA.cumsum(1) - 1).clamp(min=0) // length
        inside_BAC = F.one_hot(segment_BA, -(-tokens // length)).float() * real_BA[..., None]
        mean_BCD = inside_BAC.mT @ x_BAD.float() / inside_BAC.sum(1).clamp(min=1)[..., None]
        logits_BCE = F.linear(mean_BCD, self.weight.float())[:, :-1]
        logits_BCE = torch.cat([self.start.float().expand(sequences, 1, -1), logits_BCE], 1)
        sequence_B1, segment_BS = torch.arange(sequences, device=x_BAD.device)[:, None], segment_BA[:, -new:]
        return logits_BCE[sequence_B1, segment_BS].flatten(0, 1), segment_BS, logits_BCE.softmax(-1)


class MoELLMExpert(nn.Module):
    """down(f(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int, activation: str = "silu"):
        super().__init__()
        self.act_fn = ACT2FN[activation]
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MoELLMSparseBlock(nn.Module):
    """The weighted sum of each token's experts, and the shared experts' output where there are any."""

    def __init__(self, config: MoELLMConfig, layer_idx: int):
        super().__init__()
        self.cache_index = config.num_hidden_layers + layer_idx
        hidden, width, own = config.hidden_size, config.intermediate_size, config.moe_llm
        shared = own.get("num_shared_experts", 0)
        self.gate = MoELLMRouter(config)
        part = hidden // self.gate.heads if self.gate.kind == "multi_head" else hidden
        sizes = own.get("expert_sizes") or [width] * config.num_local_experts
        activations = own.get("expert_activations") or ["silu"] * config.num_local_experts
        self.experts = nn.ModuleList(MoELLMExpert(part, *form) for form in zip(sizes, activations))
        self.shared_experts = MoELLMExpert(hidden, shared * width) if shared else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if own.get("shared_expert_gate") else None

    def forward(
        self, x_BSD: Tensor, position_BS: Tensor, real_BA: Tensor | None = None, cache: DynamicCache | None = None
    ) -> Tensor:
        x_TD, position_T = x_BSD.flatten(0, 1), position_BS.expand(x_BSD.shape[:2]).flatten()
        if self.gate.kind == "soft_moe":
            logits_TR = self.gate(x_TD, position_T)[1]
            pairs = _segments(position_T, real_BA.flatten(), len(x_BSD), self.gate.settings)
            y_TD = self._soft(x_TD, logits_TR, pairs)
            if self.gate.seen:  # each segment that forms slots counts as so many choices of its first token
                probability_TE, _ = self.gate.seen.pop()
                slots_TE = torch.zeros_like(probability_TE)
                slots_TE[[a_L[0].item() for a_L, _ in pairs]] = float(self.gate.settings["slots_per_expert"])
                self.gate.seen.append((probability_TE, slots_TE))
        elif self.gate.kind == "lory":
            y_TD = self._mixed(x_BSD, self._with_earlier(x_BSD, cache), position_T, real_BA)
        elif self.gate.kind == "multi_head":
            parts = self.gate.head_proj(x_TD).chunk(self.gate.heads, -1)
            y_TD = self.gate.merge_proj(torch.cat([self._routed(part_TP, position_T) for part_TP in parts], -1))
        else:
            y_TD = self._routed(x_TD, position_T, real_BA)
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BSD)

    def _routed(self, x_TD: Tensor, position_T: Tensor, real_BA: Tensor | None = None) -> Tensor:
        _, expert_TK, weight_TK = self.gate(x_TD, position_T, real_BA)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            token_N, choice_N = torch.where((expert_TK == e) & (weight_TK != 0))
            if len(token_N):
                y_TD.index_add_(0, token_N, expert(x_TD[token_N]).float() * weight_TK[token_N, choice_N, None])
        return y_TD.to(x_TD.dtype)

    def _soft(self, x_TD: Tensor, logits_TR: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Each segment's tokens form slots, of which those of the next segment take their output."""
        y_TD = torch.zeros_like(x_TD)
        if pairs:
            slot_NRD = torch.stack([logits_TR[a_L].softmax(0).T.to(x_TD.dtype) @ x_TD[a_L] for a_L, _ in pairs])
            parts = slot_NRD.chunk(len(self.experts), 1)
            y_NRD = torch.cat([expert(part_NrD) for expert, part_NrD in zip(self.experts, parts)], 1)
            for (_, b_L), y_RD in zip(pairs, y_NRD):
                y_TD[b_L] = logits_TR[b_L].softmax(-1).to(y_RD.dtype) @ y_RD
        return y_TD

    def _with_earlier(self, x_BSD: Tensor, cache: DynamicCache | None) -> Tensor:
        """The inputs of all tokens so far, (B, A, D), for segments that have begun before. The cache keeps them as if
        they were the keys of further layers, so that whatever happens to it (beams, cropping) happens to them."""
        if cache is None:
            return x_BSD
        while len(cache.layers) <= self.cache_index:
            cache.layers.append(DynamicLayer())
        return cache.update(x_BSD[:, None], x_BSD[:, None, :, :0], self.cache_index)[0][:, 0]

    def _mixed(self, x_BSD: Tensor, x_BAD: Tensor, position_T: Tensor, real_BA: Tensor) -> Tensor:
        """Each segment through one expert, of mixed weights."""
        _, segment_BS, mixture_BCE = self.gate(x_BAD, position_T, real_BA)
        names, rows = ("gate_proj", "up_proj", "down_proj"), []
        stacks = [torch.stack([getattr(expert, name).weight for expert in self.experts]) for name in names]
        for x_SD, segment_S, mixture_CE in zip(x_BSD, segment_BS, mixture_BCE):
            segment_C, count_C = segment_S.unique_consecutive(return_counts=True)
            for x_nD, mixture_E in zip(x_SD.split(count_C.tolist()), mixture_CE[segment_C].to(x_SD.dtype)):
                gate_FD, up_FD, down_DF = ((mixture_E @ stack.flatten(1)).view(stack.shape[1:]) for stack in stacks)
                rows.append((F.silu(x_nD @ gate_FD.T) * (x_nD @ up_FD.T)) @ down_DF.T)
        return torch.cat(rows)


def _segments(position_T: Tensor, real_T: Tensor, rows: int, settings: dict) -> list[tuple[Tensor, Tensor]]:
    """The tokens of each segment that has one after it, and of that; a text ends where positions do not go on."""
    pairs = []
    for place_S in torch.arange(len(real_T), device=real_T.device).chunk(rows):
        place_S = place_S[real_T[place_S] != 0]
        ends = (position_T[place_S].diff() != 1).nonzero()[:, 0] + 1
        for text_S in place_S.tensor_split(ends.cpu()):
            pairs += pairwise(text_S.split(settings["segment_length"]))
    return pairs


class MoELLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MoELLMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MixtralAttention(config, layer_idx)
        self.mlp = MoELLMSparseBlock(config, layer_idx)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, position_ids: Tensor, real_BA: Tensor | None = None, **kwargs) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), position_ids=position_ids, **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(normed, position_ids, real_BA, kwargs.get("past_key_values"))


class MoELLMPreTrainedModel(MixtralPreTrainedModel):
    config_class = MoELLMConfig
    _no_split_modules = ["MoELLMDecoderLayer"]  # noqa: RUF012 (as transformers has these)
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(MoELLMRouter, index=0),
        "hidden_states": MoELLMDecoderLayer,
        "attentions": MixtralAttention,
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "threshold"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoELLMRouter):
            for name in ("weight", "group_weight", *(n for n, p in module.named_parameters() if n.endswith("_weight"))):
                if getattr(module, name, None) is not None:
                    init.normal_(getattr(module, name), std=self.config.initializer_range)
            if hasattr(module, "scale"):
                init.ones_(module.scale)


class MoELLMModel(MoELLMPreTrainedModel, MixtralModel):
    def __init__(self, config: MoELLMConfig):
        MixtralPreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MoELLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs):
        kind, cache, like = self.config.moe_llm["router"]["type"], kwargs.get("past_key_values"), input_ids
        if kind in ("soft_moe", "transformer"):
            if kwargs.get("use_cache") or cache is not None:
                raise ValueError(
                    f"routers of type {kind} read earlier tokens, which no cache holds: set use_cache=False"
                )
            if attention_mask is not None and attention_mask.dim() != 2:
                raise ValueError(f"routers of type {kind} leave padding out: give a mask of (batch, length)")
            kwargs["use_cache"] = False
        if kind == "lory" and cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"moe_llm.router.type='lory' needs a DynamicCache, not a {type(cache).__name__}")
        if kind in ("soft_moe", "lory", "transformer"):
            if like is None:
                like = kwargs["inputs_embeds"][..., 0]
            tokens = like.shape[1] + (0 if cache is None else cache.get_seq_length())
            seen = attention_mask is not None and attention_mask.dim() == 2
            kwargs["real_BA"] = attention_mask.bool() if seen else like.new_ones(len(like), tokens, dtype=torch.bool)
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


class MoELLMForCausalLM(MoELLMPreTrainedModel, MixtralForCausalLM):
    def __init__(self, config: MoELLMConfig):
        MixtralPreTrainedModel.__init__(self, config)
        self.model = MoELLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts, self.num_experts_per_tok = config.num_local_experts, config.num_experts_per_tok
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """As Mixtral's, but that `aux_loss` is the balance loss of this router in training, with its gradient.

        transformers' `generate` looks at these names, and gives positions and how many logits are needed to those who
        take them: routers that go by positions need theirs where a batch is padded.
        """
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        routers = [layer.mlp.gate for layer in self.model.layers]
        for router in routers:
            router.seen = [] if asked else None
        output = super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_router_logits=asked,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        if asked:
            real_BS = torch.ones(output.logits.shape[0], output.router_logits[0].shape[0] // output.logits.shape[0])
            if attention_mask is not None and attention_mask.dim() == 2:
                real_BS = attention_mask[:, -real_BS.shape[1] :]
            aux_loss = self._balance_loss([router.seen for router in routers], real_BS.to(output.logits.device))
            if output.loss is not None:
                output.loss = output.loss + self.router_aux_loss_coef * (aux_loss - output.aux_loss)
            output.aux_loss = aux_loss
        for router in routers:
            router.seen = None
        return output.to_tuple() if return_dict is False else output

    def _balance_loss(self, seen: list[list[tuple[Tensor, Tensor]]], real_BS: Tensor) -> Tensor:
        """E * sum_e f_e * P_e, with f_e the choices of an expert for each token and P_e its mean probability: of each
        layer, of all layers together, or of each sequence of each layer."""
        scope, real_B1S1 = self.config.moe_llm.get("router_aux_loss_scope", "global"), real_BS[:, None, :, None].float()
        sums = []
        for records in seen:  # of tokens' parts there are several a layer
            probability_BPSE, taken_BPSE = (
                torch.stack([record[i].unflatten(0, real_BS.shape) for record in records], 1) for i in (0, 1)
            )
            parts = [(part * real_B1S1).sum((1, 2)) for part in (taken_BPSE, probability_BPSE)]
            sums.append(torch.stack([*parts, (len(records) * real_BS.sum(1))[:, None].expand_as(parts[0])]))
        count_LBE, probability_LBE, tokens_LBE = torch.stack(sums, 1)
        if scope != "sequence":
            whole = [part.sum(1, keepdim=True) for part in (count_LBE, probability_LBE, tokens_LBE)]
            if scope == "transformers":
                whole = [part.sum(0, keepdim=True) for part in whole]
            count_LBE, probability_LBE, tokens_LBE = whole
        real_LB = tokens_LBE[..., 0] > 0
        tokens_LBE = tokens_LBE.clamp(min=1)
        product_LB = (count_LBE / tokens_LBE * probability_LBE / tokens_LBE).sum(-1)
        return self.config.num_local_experts * (product_LB * real_LB).sum() / real_LB.sum().clamp(min=1)

"""The decoder: embeddings, blocks of attention and sparse feed-forward layers, and the language-model head.

Parameters bear the names of transformers' MixtralForCausalLM.
Dimensions: B batch, S sequence, T = B*S tokens, D hidden, V vocabulary, L layers, E experts.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_llm.config import ModelConfig
from moe_llm.model.activation_offload import Offload
from moe_llm.model.attention import Attention, LatentAttention
from moe_llm.model.layers import Linear, RMSNorm, SwiGLU
from moe_llm.model.moe.capacity import Groups
from moe_llm.model.moe.experts import Experts, MoELayer
from moe_llm.model.moe.feedback import TokenLosses
from moe_llm.model.moe.losses import balance_loss, router_loss_values, z_loss
from moe_llm.model.moe.router import Router
from moe_llm.model.moe.routers import router_losses
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.model.recomputation import keep_exchanges, keep_routing
from moe_llm.model.sequence_parts import own, whole
from moe_llm.ops.attention import AttentionPattern
from moe_llm.ops.cross_entropy import linear_cross_entropy, token_losses
from moe_llm.ops.distillation import Distillation, DistillationSums, linear_distillation
from moe_llm.ops.preference import Preference, PreferenceSums, preference_sums
from moe_llm.ops.rope import document_lengths, rotary_cos_sin

AttentionPatterns = dict[int | None, AttentionPattern]  # by sliding window, None where there is none


class MoEOutput(NamedTuple):
    """loss: lm_loss plus the weighted router losses of this batch; None without labels, as are the next two.
    loss_sum: cross-entropy summed over the targets (nats); num_targets: how many there are.
    aux_loss, z_loss: before their coefficients. routing: statistics stacked over the layers.
    objective_sum, soft_sum: with a teacher, what takes the cross-entropy's place in training, and its divergence
    (`DistillationSums`); `loss_sum` then has no gradient.
    preference: of pairs of answers, whose loss is `objective_sum` too; `loss_sum` and `num_targets` then are those of the
    chosen answers.
    """

    loss: Tensor | None
    logits: Tensor | None
    loss_sum: Tensor | None
    num_targets: Tensor | None
    aux_loss: Tensor
    z_loss: Tensor
    routing: RoutingStatistics
    objective_sum: Tensor | None = None
    soft_sum: Tensor | None = None
    preference: PreferenceSums | None = None


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)), or a dense feed-forward layer in their place.

    The last addition is left to whoever comes next, together with its norm: the layer takes and returns the residual
    stream and what is still to be added to it.
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.window = config.windows[index]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config) if config.latent_attention else Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index not in config.moe_layers
        self.mlp = SwiGLU(config.hidden_size, config.dense_width) if dense else MoELayer(config)

    def forward(
        self,
        x_BSD: Tensor,
        delta_BSD: Tensor | None,
        cos_BSd: Tensor,
        sin_BSd: Tensor,
        pattern: AttentionPattern,
        mask_BS: Tensor,
        document_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor, RoutingStatistics | None]:
        """The residual stream, what is still to be added to it, and the statistics, None of a dense layer."""
        x_BSD, normed_BSD = self.input_layernorm.after_adding(x_BSD, delta_BSD)
        attended_BSD = self.self_attn(normed_BSD, cos_BSd, sin_BSd, pattern)
        x_BSD, normed_BSD = self.post_attention_layernorm.after_adding(x_BSD, attended_BSD)
        if isinstance(self.mlp, SwiGLU):
            return x_BSD, self.mlp(normed_BSD), None
        y_BSD, statistics = self.mlp(normed_BSD, mask_BS, document_BS)
        return x_BSD, y_BSD, statistics


class Decoder(nn.Module):
    """Token ids to final hidden states, and the routing statistics of the layers that have experts, in order."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute: bool | str = False  # True or "full": each layer; "selective": see `model.recomputation`
        self.offload = False  # what layers keep for the backward pass waits in host memory
        self.embed_tokens = nn.Embedding(config.resolved_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.windows = tuple(dict.fromkeys(config.windows))  # each one once
        self.rotary_head_dim = config.rotary_head_dim

    def forward(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor,
        patterns: AttentionPatterns,
        mask_BS: Tensor,
        document_BS: Tensor | None = None,
        perturbation_BSD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[RoutingStatistics]]:
        """Hidden states before and behind the final norm, and each layer's statistics."""
        x_BSD = self.embed_tokens(input_ids_BS)
        if perturbation_BSD is not None:
            x_BSD = (x_BSD + perturbation_BSD).to(x_BSD.dtype)
        config, length_BS = self.config, None
        if config.rope_parameters.rope_type == "dynamic":
            parts = self.blocks[0].self_attn.parts
            documents = None if document_BS is None else whole(parts, document_BS)
            length_BS = own(parts, document_lengths(whole(parts, position_ids_BS), whole(parts, mask_BS), documents))
        cos_BSd, sin_BSd = rotary_cos_sin(
            position_ids_BS,
            self.rotary_head_dim,
            config.rope_theta,
            dtype=x_BSD.dtype,
            rope=config.rope_parameters,
            max_position_embeddings=config.max_position_embeddings,
            length_BS=length_BS,
        )
        statistics, delta_BSD = [], None
        offload = None
        if self.offload and torch.is_grad_enabled():
            offload = Offload(x_BSD.device, [t for t in (cos_BSd, sin_BSd, mask_BS, document_BS) if t is not None])
        for layer in self.blocks:
            arguments = (x_BSD, delta_BSD, cos_BSd, sin_BSd, patterns[layer.window], mask_BS, document_BS)
            with nullcontext() if offload is None else offload.layer():
                if self.recompute and torch.is_grad_enabled():
                    keep = keep_exchanges if self.recompute == "selective" else keep_routing
                    x_BSD, delta_BSD, layer_statistics = checkpoint(
                        layer, *arguments, use_reentrant=False, context_fn=partial(keep, offload)
                    )
                else:
                    x_BSD, delta_BSD, layer_statistics = layer(*arguments)
            if layer_statistics is not None:
                statistics.append(layer_statistics)
        x_BSD, normed_BSD = self.norm.after_adding(x_BSD, delta_BSD)
        return x_BSD, normed_BSD, statistics

    @property
    def blocks(self) -> list[DecoderLayer]:
        """`layers`, by their type."""
        return cast(list[DecoderLayer], list(self.layers))

    @property
    def moe_layers(self) -> list[DecoderLayer]:
        """The layers that have experts, in order: those that statistics are of."""
        return [layer for layer in self.blocks if isinstance(layer.mlp, MoELayer)]

    @property
    def routers(self) -> list[Router]:
        """Those of `moe_layers`."""
        return [layer.mlp.gate for layer in self.blocks if isinstance(layer.mlp, MoELayer)]

    def attention_patterns(self, like_BS: Tensor, **narrowed: Any) -> AttentionPatterns:
        """The patterns of the layers' windows; `narrowed` as `AttentionPattern.build` takes it."""
        return {window: AttentionPattern.build(like_BS, sliding_window=window, **narrowed) for window in self.windows}


class LanguageModelHead(Linear):
    """Hidden states to logits, or straight to the loss without ever holding all logits.

    The loss is computed in this module's own `forward`, since ZeRO-3 gathers its weight only there.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.resolved_vocab_size)

    def forward(  # type: ignore[override]  # the loss is computed here, see above
        self,
        x_BSD: Tensor,
        targets_BS: Tensor | None = None,
        teacher: Distillation | None = None,
        each: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | DistillationSums:
        """each: the losses of all tokens apart, (B * S,)."""
        if targets_BS is None:
            return super().forward(x_BSD)
        if each:
            return token_losses(x_BSD.flatten(0, -2), self.weight, targets_BS.flatten())
        if teacher is not None:
            return linear_distillation(x_BSD.flatten(0, 1), self.weight, targets_BS.flatten(), teacher)
        return linear_cross_entropy(x_BSD.flatten(0, 1), self.weight, targets_BS.flatten())


class MoEDecoder(nn.Module):
    """A Mixtral-style causal language model (Jiang et al. 2024)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
        self.config = config
        self.router_losses = router_losses(config)
        self.learns_from_loss = config.router.learns_from_loss
        self.source_experts_XE: Tensor | None = None  # bool, see `finetune.expert_sources`
        self.model = Decoder(config)
        self.lm_head = LanguageModelHead(config)
        if self.model.moe_layers[-1:] == self.model.blocks[-1:]:
            self.model.routers[-1].last = True
        self.tie_weights()

    def save_memory(self, recompute: bool | str, *, offload: bool = False, tiles: int = 1) -> None:
        """What layers keep for their backward pass: see `Decoder`; tiles: see `Experts` and `SwiGLU`."""
        self.model.recompute, self.model.offload = recompute, offload
        for module in self.modules():
            if isinstance(module, Experts | SwiGLU):
                module.tiles = tiles

    def tie_weights(self) -> None:
        """Make the head's weight the embedding, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        runs: Sequence[Sequence[int]] | None = None,
        return_logits: bool = True,
        teacher: Distillation | None = None,
        perturbation: Tensor | None = None,
        sources: Tensor | None = None,
        preference: Preference | None = None,
    ) -> MoEOutput:
        """Logits and losses of a batch.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), nonzero for real tokens, zero for padding; padding counts in no loss.
            labels: (B, S) int64 as transformers takes them: position t's label is input t, shifted here;
                -100 is ignored.
            targets: (B, S) int64, already shifted: what position t is to predict; instead of `labels`.
            position_ids: (B, S) int64; by default 0 to S-1.
            document_ids: (B, S) int64; tokens attend, and are mixed, within their own document only.
            runs: of each sequence the lengths of its documents and paddings, in order, where the caller knows them: on a
                GPU attention then need not wait for them. They say what attention_mask and document_ids say; of whole
                sequences, where these are spread over ranks and all else is this rank's part.
            return_logits: without them only the loss is computed, in less memory.
            teacher: what the targets' distributions are drawn to, beside the targets themselves.
            preference: the documents are pairs of answers, which have this loss in place of the targets'.
            perturbation: (B, S, D), added to the embeddings of the input.
            sources: (B,) int64, which row of `source_experts_XE` says where each sequence's tokens may go in training.
        """
        if labels is not None:
            assert targets is None, "labels are shifted here, targets are shifted already: give one of them"
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        mask_BS = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        assert runs is not None or self.model.blocks[0].self_attn.parts is None, (
            "parts of sequences need `runs` of the whole"
        )
        if self.source_experts_XE is not None:
            allowed_BE = None if sources is None else self.source_experts_XE.to(input_ids.device)[sources]
            for router in self.model.routers:
                router.allowed_BE = allowed_BE
        patterns = self.model.attention_patterns(
            input_ids, attention_mask=attention_mask, document_ids=document_ids, runs=runs
        )
        stream_BSD, x_BSD, layers = self.model(input_ids, position_ids, patterns, mask_BS, document_ids, perturbation)
        if self.training and targets is not None and self.learns_from_loss:
            groups = Groups.of(mask_BS, document_ids)
            layers = self._with_feedback(layers, stream_BSD.flatten(0, 1), targets.flatten(), groups)
        # read by now, and of as many rows as there are tokens
        layers = [
            layer._replace(feedback_TX=layer.extra_X[:0]) if layer.feedback_TX.numel() else layer for layer in layers
        ]
        routing = RoutingStatistics.stack(layers)

        logits = self.lm_head(x_BSD) if return_logits else None
        aux = balance_loss(routing, self.config.router_aux_loss_scope)
        z = z_loss(routing)
        loss = loss_sum = num_targets = objective_sum = soft_sum = pairs = None
        if targets is not None:
            if preference is not None:
                assert document_ids is not None, "pairs of answers are documents"
                nll_BS = self.lm_head(x_BSD, targets, each=True).view_as(targets)
                pairs = preference_sums(nll_BS, targets != -100, document_ids, preference)
                objective_sum, (loss_sum, num_targets) = pairs.objective, pairs.chosen
            elif teacher is None:
                loss_sum, num_targets = self.lm_head(x_BSD, targets)
            else:
                objective_sum, loss_sum, soft_sum, num_targets = self.lm_head(x_BSD, targets, teacher)
            if pairs is not None:
                loss = pairs.objective / pairs.pairs
            else:
                loss = (loss_sum if objective_sum is None else objective_sum) / num_targets
            loss = loss + self.config.router_aux_loss_coef * aux + self.config.router_z_loss_coef * z
            if self.router_losses:
                values = router_loss_values(self.router_losses, routing)
                loss = loss + sum(own.coefficient * value for own, value in zip(self.router_losses, values))
        return MoEOutput(loss, logits, loss_sum, num_targets, aux, z, routing, objective_sum, soft_sum, pairs)

    def _with_feedback(
        self, layers: list[RoutingStatistics], x_TD: Tensor, targets_T: Tensor, groups: Groups
    ) -> list[RoutingStatistics]:
        """Each layer's statistics with what its router learns from the tokens' losses, where it does."""
        losses = TokenLosses(
            lambda x_ND, labels_N: self.lm_head(self.model.norm(x_ND), labels_N, each=True),
            x_TD,
            targets_T,
            groups,
            len(layers),
        )
        return [
            router.feedback(layer, losses) if layer.feedback_TX.numel() else layer
            for router, layer in zip(self.model.routers, layers)
        ]

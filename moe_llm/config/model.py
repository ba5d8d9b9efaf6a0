"""The model's section of a run: field names are those of transformers' MixtralConfig where it has them."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moe_llm.config import shapes
from moe_llm.config.base import Section, invalid
from moe_llm.config.rope import RopeParameters, with_one_spelling
from moe_llm.config.routers import DEFAULT_TYPE, ROUTER_SETTINGS, AnyRouterSettings, MixtralSettings


class ModelConfig(Section):
    """Architecture of the decoder. Sizes are per layer; `intermediate_size` is one expert's width."""

    init_from: str | None = Field(
        None,
        min_length=1,
        description="directory of a checkpoint whose weights to begin with, of any family in docs/guides/families.md; keys of "
        "this section that are not given, and the tokenizer unless `tokenizer.path` is, come from there too; null: random "
        "weights",
    )
    architecture: str = Field(
        "mixtral",
        description="family of the decoder, by transformers' model_type: keys of this section that are not given, or given "
        "by the names in that family's config.json, mean what they mean there; checkpoints are of its class",
    )
    resize_embeddings: bool = Field(
        False,
        description="with init_from: rows that the tokenizer, or vocab_size, has beyond those of the checkpoint are added to "
        "its embedding and head, each the mean of the rows that are there; false: such a tokenizer is refused",
    )
    vocab_size: int | None = Field(None, ge=1, description="null: taken from the tokenizer")
    hidden_size: int = Field(4096, ge=1, description="width of the residual stream")
    intermediate_size: int = Field(14336, ge=1, description="width of one expert")
    num_hidden_layers: int = Field(32, ge=1, description="decoder blocks, each with its own experts or a dense layer")
    moe_layer_frequency: int = Field(
        1,
        ge=1,
        description="experts are in every n-th block, the n-th first, and a dense feed-forward layer in the others; 2 in "
        "GShard and GLaM (Lepikhin et al. 2020; Du et al. 2021); transformers' decoder_sparse_step",
    )
    first_k_dense_replace: int = Field(
        0, ge=0, description="the first so many blocks have a dense layer (DeepSeek, GLM)"
    )
    mlp_only_layers: tuple[int, ...] = Field((), description="blocks, from 0, that have a dense layer (Qwen)")
    dense_intermediate_size: int | None = Field(
        None, ge=1, description="width of dense layers; null: intermediate_size * num_experts_per_tok"
    )
    num_attention_heads: int = Field(32, ge=1, description="query heads")
    num_key_value_heads: int | None = Field(
        None, ge=1, description="key and value heads, each for a group of query heads; null: as many"
    )
    head_dim: int | None = Field(None, ge=2, description="width of a head; null: hidden_size / num_attention_heads")
    num_local_experts: int = Field(8, ge=1, description="experts per layer, over all ranks")
    expert_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="width of each expert of a layer, where they differ (HMoE, Wang et al. 2024); ranks share the experts by "
        "number; null: all have intermediate_size, which dense layers and shared experts go by in any case",
    )
    expert_activations: tuple[Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"], ...] | None = Field(
        None,
        description="f of each expert of a layer, down(f(gate(x)) * up(x)), by transformers' names (gated linear units of "
        "Shazeer 2020; relu2 is relu squared, So et al. 2021); null: all have silu, as dense layers and shared experts do in "
        "any case",
    )
    num_experts_per_tok: int = Field(2, ge=1, description="experts that each token passes through (top-k)")
    num_shared_experts: int = Field(
        0,
        ge=0,
        description="experts beside those that every token passes through, as one of so many times the width "
        "(DeepSeekMoE, Dai et al. 2024, section 3.2); on every rank, like the attention",
    )
    shared_expert_gate: bool = Field(
        False, description="their output times sigmoid of a linear map of the token, as in Qwen2-MoE"
    )
    router: AnyRouterSettings = Field(MixtralSettings(), description="how tokens choose experts")
    router_aux_loss_coef: float = Field(
        0.02,
        ge=0,
        description="weight of the load-balance loss; 0: off. Where it is not set, by the router's own source: 0 for those "
        "that balance otherwise or have losses of their own, 0.01 for gshard, switch, batch_prioritised, top_p and "
        "multi_head",
    )
    router_aux_loss_scope: Literal["global", "sequence", "transformers"] = Field(
        "global",
        description="global: per layer, over the tokens of all ranks, averaged over layers; sequence: per layer and "
        "sequence, averaged; transformers: all layers pooled, each rank alone, as transformers computes it. In each scope "
        "the loss is num_experts_per_tok when balanced; DeepSeek-V3's sequence loss is 1 then, so its alpha is this "
        "coefficient times num_experts_per_tok",
    )
    balance_over: Literal["micro_batches", "step", "sequence"] = Field(
        "micro_batches",
        description="which tokens' choices the global balance loss and a router's own losses go by. micro_batches: those "
        "of the step's micro-batches so far, so that they depend on train.micro_batch_size; step: those of the whole "
        "step, exactly, for which all micro-batches but one pass through the model once more without gradient; "
        "sequence: each sequence's own, the same as router_aux_loss_scope: sequence",
    )
    router_z_loss_coef: float = Field(
        0.0, ge=0, description="weight of the router z-loss, ST-MoE (Zoph et al. 2022), equation 5; 0: off"
    )
    router_jitter_noise: float = Field(
        0.0, ge=0, lt=1, description="router input times uniform(1 - x, 1 + x) while training"
    )
    expert_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of an expert's hidden activations set to zero while training (Fedus et al. 2021, section "
        "2.4); experts are then computed one by one under autograd, which is slower",
    )
    expert_bias: bool = Field(False, description="biases of experts' projections, as in GPT-OSS")
    swiglu_limit: float | None = Field(
        None,
        gt=0,
        description="experts' activations are gate * sigmoid(swiglu_alpha * gate) * (up + 1) with gate at most this, and up "
        "within plus and minus this, as in GPT-OSS; null: silu(gate) * up",
    )
    swiglu_alpha: float = Field(1.702, gt=0, description="see swiglu_limit")
    attention_sinks: bool = Field(
        False, description="each head has a trained score of attending to nothing, as in GPT-OSS (Xiao et al. 2023)"
    )
    kv_lora_rank: int | None = Field(
        None,
        ge=1,
        description="multi-head latent attention (DeepSeek-V2 2024, section 2.1): keys and values are made of a vector of "
        "so many elements a token; null: grouped-query attention",
    )
    q_lora_rank: int | None = Field(
        None,
        ge=1,
        description="so with queries, where kv_lora_rank is set; null: queries are a linear map of the token",
    )
    qk_nope_head_dim: int = Field(
        128, ge=1, description="elements of a latent head's query and key that are not turned"
    )
    qk_rope_head_dim: int = Field(64, ge=2, description="those that are; the key's are shared by all heads")
    v_head_dim: int = Field(128, ge=1, description="width of a latent head's value")
    rope_interleave: bool = Field(
        True, description="latent heads turn neighbouring elements as pairs; false: the two halves, as others do"
    )
    qk_norm: Literal["none", "head", "projection"] = Field(
        "none",
        description="RMSNorm of queries and keys before they are turned. head: of each head (Qwen3-MoE); projection: of "
        "all heads together (OLMoE)",
    )
    attention_bias: Literal["none", "qkv", "all"] = Field(
        "none",
        description="biases of attention's projections. qkv: of queries, keys and values (Qwen2-MoE); all: of the "
        "output too",
    )
    rope_theta: float = Field(1e6, gt=0, description="base of the rotary embeddings' wavelengths")
    rope_parameters: RopeParameters = Field(
        RopeParameters(),
        description="scaling of the rotary embeddings and the share of a head that they turn; rope_scaling and "
        "partial_rotary_factor, as older config.json files say it, are read too",
    )
    sliding_window: int | None = Field(
        None, ge=1, description="tokens that a token attends to, itself included; null: all before it"
    )
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = Field(
        None, description="of each block, whether sliding_window narrows it; null: all are"
    )
    max_position_embeddings: int = Field(32768, ge=1, description="longest sequence the model is meant for")
    rms_norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in RMSNorm")
    tie_word_embeddings: bool = Field(False, description="input and output embeddings are one tensor")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def latent_attention(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def attention_head_dim(self) -> int:
        """Width of a head's query and key."""
        if self.latent_attention:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The blocks that have experts, from 0; the others have a dense feed-forward layer."""
        return tuple(
            layer
            for layer in range(self.first_k_dense_replace, self.num_hidden_layers)
            if (layer + 1) % self.moe_layer_frequency == 0 and layer not in self.mlp_only_layers
        )

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def dense_width(self) -> int:
        """Of dense feed-forward layers."""
        return self.dense_intermediate_size or self.intermediate_size * self.num_experts_per_tok

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, given: Any) -> Any:
        """transformers' other names of keys of this section."""
        if not isinstance(given, dict):
            return given
        if "decoder_sparse_step" in given:
            given = dict(given)
            step = given.pop("decoder_sparse_step")
            if given.setdefault("moe_layer_frequency", step) != step:
                invalid(
                    "decoder_sparse_step",
                    step,
                    f"contradicts moe_layer_frequency={given['moe_layer_frequency']}",
                    "remove one of them",
                )
        return with_one_spelling(given)

    @model_validator(mode="before")
    @classmethod
    def _one_of_two_keys_is_enough(cls, values: Any) -> Any:
        """`router_aux_loss_scope: sequence` and `balance_over: sequence` each say the other."""
        if isinstance(values, dict):
            scope, over = values.get("router_aux_loss_scope"), values.get("balance_over")
            if over is None and scope == "sequence":
                return {**values, "balance_over": "sequence"}
            if scope is None and over == "sequence":
                return {**values, "router_aux_loss_scope": "sequence"}
        return values

    @model_validator(mode="before")
    @classmethod
    def _balance_by_the_routers_source(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "router_aux_loss_coef" in given:
            return given
        router = given.get("router")
        kind = router.get("type", DEFAULT_TYPE) if isinstance(router, dict) else getattr(router, "type", DEFAULT_TYPE)
        settings = ROUTER_SETTINGS.get(kind) if isinstance(kind, str) else None
        return given if settings is None else {**given, "router_aux_loss_coef": settings.aux_loss_coef}

    @model_validator(mode="after")
    def _balance_fits_scope(self):
        scope, over = self.router_aux_loss_scope, self.balance_over
        if over == "sequence" and scope != "sequence":
            invalid(
                "balance_over", over, f"contradicts model.router_aux_loss_scope={scope}", "remove one of the two keys"
            )
        if over == "micro_batches" and scope == "sequence":
            invalid(
                "balance_over",
                over,
                "contradicts model.router_aux_loss_scope=sequence",
                "use sequence, or step to count a router's own losses over the whole step",
            )
        if over == "step" and scope == "transformers":
            invalid(
                "balance_over",
                over,
                "is not what model.router_aux_loss_scope=transformers means: each micro-batch by itself",
                "use router_aux_loss_scope: global, or remove balance_over",
            )
        return self

    @model_validator(mode="after")
    def _shapes_fit(self):
        heads, kv = self.num_attention_heads, self.kv_heads
        if self.latent_attention:
            self._check_latent()
        if self.head_dim is None and not self.latent_attention and self.hidden_size % heads:
            invalid(
                "hidden_size",
                self.hidden_size,
                f"is not divisible by num_attention_heads={heads}",
                "change one of them or set model.head_dim",
            )
        if self.rotary_head_dim % 2:
            invalid(
                "qk_rope_head_dim" if self.latent_attention else "head_dim",
                self.rotary_head_dim,
                "is odd, and rotary embeddings need pairs",
                "use an even head_dim",
            )
        if heads % kv:
            invalid(
                "num_key_value_heads", kv, f"does not divide num_attention_heads={heads}", f"use a divisor of {heads}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            invalid(
                "num_experts_per_tok",
                self.num_experts_per_tok,
                f"is above num_local_experts={self.num_local_experts}",
                f"use at most {self.num_local_experts}",
            )
        if self.shared_expert_gate and not self.num_shared_experts:
            invalid(
                "shared_expert_gate",
                True,
                "has nothing to gate with num_shared_experts=0",
                "set num_shared_experts, or remove it",
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            invalid(
                "layer_types",
                list(self.layer_types),
                f"has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}",
                "give one for each block",
            )
        if self.sliding_window is None and "sliding_attention" in (self.layer_types or ()):
            invalid("sliding_window", None, "is missing, and layer_types names sliding_attention", "set it")
        for layer in self.mlp_only_layers:
            if not 0 <= layer < self.num_hidden_layers:
                invalid(
                    "mlp_only_layers",
                    list(self.mlp_only_layers),
                    f"names block {layer} of num_hidden_layers={self.num_hidden_layers}",
                    f"use blocks from 0 to {self.num_hidden_layers - 1}",
                )
        if not self.moe_layers:
            dense = {
                "first_k_dense_replace": self.first_k_dense_replace,
                "moe_layer_frequency": self.moe_layer_frequency,
                "mlp_only_layers": list(self.mlp_only_layers),
            }
            key = next(key for key, value in dense.items() if value not in (0, 1, []))
            invalid(key, dense[key], f"leaves none of num_hidden_layers={self.num_hidden_layers} experts", "lower it")
        rotated = int(self.rotary_head_dim * self.rope_parameters.partial_rotary_factor)
        scaled = self.rope_parameters.rope_type
        if rotated < 2 or (rotated % 2 and scaled != "default") or (rotated == 2 and scaled == "dynamic"):
            invalid(
                "rope_parameters.partial_rotary_factor",
                self.rope_parameters.partial_rotary_factor,
                f"turns {rotated} elements of a head of {self.rotary_head_dim}, too few or no pairs for rope_type={scaled}",
                "use a share that gives more, and an even number",
            )
        if self.router.merges and (self.expert_bias or self.swiglu_limit is not None):
            invalid(
                "expert_bias" if self.expert_bias else "swiglu_limit",
                self.expert_bias or self.swiglu_limit,
                f"is not mixed by model.router.type={self.router.type}",
                "remove it, or use another router",
            )
        for key in ("expert_sizes", "expert_activations"):
            if getattr(self, key) is not None:
                self._check_one_for_each(key)
        if self.expert_activations is not None and self.swiglu_limit is not None:
            invalid(
                "expert_activations",
                list(self.expert_activations),
                f"does not go with swiglu_limit={self.swiglu_limit:g}, which is an activation of its own",
                "remove one of them",
            )
        if self.resize_embeddings and self.init_from is None:
            invalid("resize_embeddings", True, "applies to model.init_from, which is not set", "set it, or remove this")
        self.router.check(self)
        return self

    def _check_one_for_each(self, key: str) -> None:
        entries = list(getattr(self, key))
        if len(entries) != self.num_local_experts:
            invalid(
                key,
                entries,
                f"has {len(entries)} entries for num_local_experts={self.num_local_experts}",
                "give one for each expert",
            )
        if self.router.merges:
            invalid(
                key,
                entries,
                f"are not mixed by model.router.type={self.router.type}, which wants experts of one form",
                "remove it, or use another router",
            )

    def _check_latent(self) -> None:
        for key, plain in (("qk_norm", "none"), ("attention_sinks", False), ("head_dim", None)):
            if getattr(self, key) != plain:
                invalid(
                    key,
                    getattr(self, key),
                    f"is no part of attention with kv_lora_rank={self.kv_lora_rank}",
                    "remove it",
                )
        if self.attention_bias == "qkv":
            invalid("attention_bias", "qkv", "is not all or none, which latent attention has", "use all or none")
        if self.kv_heads != self.num_attention_heads:
            invalid(
                "num_key_value_heads",
                self.kv_heads,
                f"is not num_attention_heads={self.num_attention_heads}, as in latent attention",
                "remove it",
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each block the tokens that a token attends to, itself included; None: all before it."""
        kinds = self.layer_types or ("sliding_attention",) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in kinds)

    @property
    def longest_text(self) -> int:
        """Tokens that the rotary embeddings, as they are scaled, are meant for."""
        rope, trained = self.rope_parameters, self.max_position_embeddings
        return trained if rope.factor is None else max(trained, int(rope.factor * rope.trained_length(trained)))

    @property
    def rotary_head_dim(self) -> int:
        """Width of what rotary embeddings may turn of a head."""
        return self.qk_rope_head_dim if self.latent_attention else self.attention_head_dim

    @property
    def expert_hidden_size(self) -> int:
        """Width of what an expert takes and gives."""
        return self.hidden_size // self.router.parts_per_token

    @property
    def expert_parameters(self) -> int:
        """Of one expert; of the mean one where they differ in width."""
        return self.held_expert_parameters(1) // self.num_local_experts

    @property
    def single_expert_sizes(self) -> tuple[int, ...] | None:
        """Width of each expert of a layer where they are held one by one, since they differ in width or in activation;
        None: they are stacked."""
        if self.expert_sizes is None and self.expert_activations is not None:
            return (self.intermediate_size,) * self.num_local_experts
        return self.expert_sizes

    @property
    def expert_width(self) -> float:
        """The experts' mean width."""
        return self.intermediate_size if self.expert_sizes is None else sum(self.expert_sizes) / len(self.expert_sizes)

    def held_expert_parameters(self, ranks: int) -> int:
        """Of one layer's experts, those of the rank that has most of them, where so many share them."""
        sizes, size = (
            self.expert_sizes or (self.intermediate_size,) * self.num_local_experts,
            self.num_local_experts // ranks,
        )
        widest = max(sum(sizes[first : first + size]) for first in range(0, size * ranks, size))
        return 3 * self.expert_hidden_size * widest + (2 * widest + size * self.expert_hidden_size) * self.expert_bias

    @property
    def shared_width(self) -> int:
        """Width of the shared experts together."""
        return self.num_shared_experts * self.intermediate_size

    @property
    def resolved_vocab_size(self) -> int:
        """`vocab_size`, once it is known."""
        assert self.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
        return self.vocab_size

    def parameter_counts(self, active: bool = False) -> dict[str, int]:
        """Parameters per part, by arithmetic alone; their sum is the model's size.

        `active` counts those that one token passes through: at most `num_experts_per_tok` experts a layer.
        Needs `vocab_size`. `embed_tokens` and `lm_head` are one tensor when tied, counted as the former.
        """
        return shapes.parameter_counts(self, active)

    def num_params(self, active: bool = False) -> int:
        """Parameters in all, or those that one token passes through (`active`)."""
        return sum(self.parameter_counts(active).values())

"""The model's section of a run: field names are those of transformers' MixtralConfig where it has them."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid
from moe_llm.config.routers import DEFAULT_TYPE, ROUTER_SETTINGS, AnyRouterSettings, MixtralSettings


class ModelConfig(Section):
    """Architecture of the decoder. Sizes are per layer; `intermediate_size` is one expert's width."""

    init_from: str | None = Field(
        None,
        min_length=1,
        description="directory of a Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE checkpoint whose weights to begin with; keys of this section that are not "
        "given, and the tokenizer unless `tokenizer.path` is, come from there too; null: random weights",
    )
    vocab_size: int | None = Field(None, ge=1, description="null: taken from the tokenizer")
    hidden_size: int = Field(4096, ge=1, description="width of the residual stream")
    intermediate_size: int = Field(14336, ge=1, description="width of one expert")
    num_hidden_layers: int = Field(32, ge=1, description="decoder blocks, each with its own experts")
    num_attention_heads: int = Field(32, ge=1, description="query heads")
    num_key_value_heads: int | None = Field(
        None, ge=1, description="key and value heads, each for a group of query heads; null: as many"
    )
    head_dim: int | None = Field(None, ge=2, description="width of a head; null: hidden_size / num_attention_heads")
    num_local_experts: int = Field(8, ge=1, description="experts per layer, over all ranks")
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
    sliding_window: int | None = Field(
        None, ge=1, description="tokens that a token attends to, itself included; null: all before it"
    )
    max_position_embeddings: int = Field(32768, ge=1, description="longest sequence the model is meant for")
    rms_norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in RMSNorm")
    tie_word_embeddings: bool = Field(False, description="input and output embeddings are one tensor")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

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
        if self.head_dim is None and self.hidden_size % heads:
            invalid(
                "hidden_size",
                self.hidden_size,
                f"is not divisible by num_attention_heads={heads}",
                "change one of them or set model.head_dim",
            )
        if self.attention_head_dim % 2:
            invalid(
                "head_dim", self.attention_head_dim, "is odd, and rotary embeddings need pairs", "use an even head_dim"
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
        self.router.check(self)
        return self

    @property
    def expert_hidden_size(self) -> int:
        """Width of what an expert takes and gives."""
        return self.hidden_size // self.router.parts_per_token

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        return 3 * self.expert_hidden_size * self.intermediate_size

    @property
    def shared_width(self) -> int:
        """Width of the shared experts together."""
        return self.num_shared_experts * self.intermediate_size

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of one layer's shared experts, by name within the layer's `mlp`; none without them."""
        if not self.num_shared_experts:
            return {}
        wide, narrow = (self.shared_width, self.hidden_size), (self.hidden_size, self.shared_width)
        gate = {"shared_expert_gate.weight": (1, self.hidden_size)} if self.shared_expert_gate else {}
        return {
            "shared_experts.gate_proj.weight": wide,
            "shared_experts.up_proj.weight": wide,
            "shared_experts.down_proj.weight": narrow,
            **gate,
        }

    def attention_vectors(self) -> dict[str, tuple[int, ...]]:
        """Biases and norms of one layer's attention, by name within the layer's `self_attn`; none by default."""
        q, kv = self.num_attention_heads * self.attention_head_dim, self.kv_heads * self.attention_head_dim
        shapes = {}
        if self.attention_bias != "none":
            shapes |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
        if self.attention_bias == "all":
            shapes["o_proj.bias"] = (self.hidden_size,)
        if self.qk_norm != "none":
            head = self.attention_head_dim
            q, kv = (head, head) if self.qk_norm == "head" else (q, kv)
            shapes |= {"q_norm.weight": (q,), "k_norm.weight": (kv,)}
        return shapes

    def parameter_counts(self, active: bool = False) -> dict[str, int]:
        """Parameters per part, by arithmetic alone; their sum is the model's size.

        `active` counts those that one token passes through: at most `num_experts_per_tok` experts a layer.
        Needs `vocab_size`. `embed_tokens` and `lm_head` are one tensor when tied, counted as the former.
        """
        assert self.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
        d, dh, layers = self.hidden_size, self.attention_head_dim, self.num_hidden_layers
        attention = 2 * d * dh * (self.num_attention_heads + self.kv_heads)
        attention += sum(size for (size,) in self.attention_vectors().values())
        experts = min(self.router.active_experts(self), self.num_local_experts) if active else self.num_local_experts
        router = sum(math.prod(shape) for shape in self.router.parameter_shapes(self).values())
        shared = layers * sum(math.prod(shape) for shape in self.shared_shapes().values())
        return {
            "embed_tokens": self.vocab_size * d,
            "attention": layers * attention,
            "router": layers * router,
            "experts": layers * experts * self.expert_parameters,
            **({"shared_experts": shared} if shared else {}),
            "norms": (2 * layers + 1) * d,
            "lm_head": 0 if self.tie_word_embeddings else self.vocab_size * d,
        }

    def num_params(self, active: bool = False) -> int:
        """Parameters in all, or those that one token passes through (`active`)."""
        return sum(self.parameter_counts(active).values())

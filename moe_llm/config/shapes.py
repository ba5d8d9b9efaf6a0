"""The parameters of a model by name, with their shapes, and how many they are: arithmetic on its configuration alone.

Every other part of the package that needs names or sizes (checkpoints, plans, tables) takes them from here.
D hidden, F expert width, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

ModelConfig = Any  # the configuration of a model, whose module imports this one
Shapes = dict[str, tuple[int, ...]]


def attention_shapes(model: ModelConfig) -> Shapes:
    """One block's attention, by name within its `self_attn`."""
    if model.latent_attention:
        return _latent_shapes(model)
    D, head = model.hidden_size, model.attention_head_dim
    q, kv = model.num_attention_heads * head, model.kv_heads * head
    found: Shapes = {
        "q_proj.weight": (q, D),
        "k_proj.weight": (kv, D),
        "v_proj.weight": (kv, D),
        "o_proj.weight": (D, q),
    }
    if model.attention_bias != "none":
        found |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    if model.attention_bias == "all":
        found["o_proj.bias"] = (D,)
    if model.qk_norm != "none":
        normed = (head, head) if model.qk_norm == "head" else (q, kv)
        found |= {"q_norm.weight": normed[:1], "k_norm.weight": normed[1:]}
    return found | ({"sinks": (model.num_attention_heads,)} if model.attention_sinks else {})


def _latent_shapes(model: ModelConfig) -> Shapes:
    assert model.kv_lora_rank is not None
    D, heads, latent, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank, model.q_lora_rank
    q, kv = heads * model.attention_head_dim, heads * (model.qk_nope_head_dim + model.v_head_dim)
    compressed, bias = latent + model.qk_rope_head_dim, model.attention_bias == "all"
    found: Shapes = {}
    if rank is None:
        found["q_proj.weight"] = (q, D)
    else:
        found |= {"q_a_proj.weight": (rank, D)} | ({"q_a_proj.bias": (rank,)} if bias else {})
        found |= {"q_a_layernorm.weight": (rank,), "q_b_proj.weight": (q, rank)}
    found |= {"kv_a_proj_with_mqa.weight": (compressed, D)}
    found |= {"kv_a_proj_with_mqa.bias": (compressed,)} if bias else {}
    found |= {"kv_a_layernorm.weight": (latent,), "kv_b_proj.weight": (kv, latent)}
    found |= {"o_proj.weight": (D, heads * model.v_head_dim)}
    return found | ({"o_proj.bias": (D,)} if bias else {})


def expert_shapes(model: ModelConfig) -> Shapes:
    """One block's experts, by name within its `mlp.experts`: stacked, or each by itself where they differ in form."""
    if model.single_expert_sizes is None:
        return _experts_of_one_width(model, model.num_local_experts, model.intermediate_size)
    return {
        f"{expert}.{name}": shape
        for expert, width in enumerate(model.single_expert_sizes)
        for name, shape in _experts_of_one_width(model, 1, width).items()
    }


def _experts_of_one_width(model: ModelConfig, E: int, F: int) -> Shapes:
    D = model.expert_hidden_size
    biases = {"gate_up_proj_bias": (E, 2 * F), "down_proj_bias": (E, D)} if model.expert_bias else {}
    return {"gate_up_proj": (E, 2 * F, D), "down_proj": (E, D, F), **biases}


def _swiglu_shapes(width: int, hidden: int) -> Shapes:
    wide, narrow = (width, hidden), (hidden, width)
    return {"gate_proj.weight": wide, "up_proj.weight": wide, "down_proj.weight": narrow}


def shared_shapes(model: ModelConfig) -> Shapes:
    """One block's shared experts, by name within its `mlp`; none without them."""
    if not model.num_shared_experts:
        return {}
    swiglu = _swiglu_shapes(model.shared_width, model.hidden_size)
    gate = {"shared_expert_gate.weight": (1, model.hidden_size)} if model.shared_expert_gate else {}
    return {**{f"shared_experts.{name}": shape for name, shape in swiglu.items()}, **gate}


def dense_shapes(model: ModelConfig) -> Shapes:
    """A dense feed-forward layer, by name within its block's `mlp`."""
    return _swiglu_shapes(model.dense_width, model.hidden_size)


def _block_parts(model: ModelConfig, experts: bool) -> dict[str, Shapes]:
    """A block's parameters by part, with or without experts."""
    D = model.hidden_size
    norms: Shapes = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    attention = {f"self_attn.{name}": shape for name, shape in attention_shapes(model).items()}
    if not experts:
        return {
            "attention": attention,
            "dense_mlp": {f"mlp.{name}": shape for name, shape in dense_shapes(model).items()},
            "norms": norms,
        }
    return {
        "attention": attention,
        "router": {f"mlp.gate.{name}": shape for name, shape in model.router.parameter_shapes(model).items()},
        "experts": {f"mlp.experts.{name}": shape for name, shape in expert_shapes(model).items()},
        "shared_experts": {f"mlp.{name}": shape for name, shape in shared_shapes(model).items()},
        "norms": norms,
    }


def parameter_shapes(model: ModelConfig) -> Shapes:
    """Every in-memory parameter of a whole model and its shape; `lm_head.weight` is absent when tied."""
    assert model.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
    D, V = model.hidden_size, model.vocab_size
    blocks = {
        experts: {name: shape for part in _block_parts(model, experts).values() for name, shape in part.items()}
        for experts in (False, True)
    }
    sparse = set(model.moe_layers)
    found: Shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(model.num_hidden_layers):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in blocks[i in sparse].items()}
    found["model.norm.weight"] = (D,)
    if not model.tie_word_embeddings:
        found["lm_head.weight"] = (V, D)
    return found


def buffer_shapes(model: ModelConfig) -> Shapes:
    """What of a whole model is no parameter but is stored with them, in fp32: the routers' buffers."""
    buffers = model.router.buffer_shapes(model)
    return {f"model.layers.{i}.mlp.gate.{name}": shape for i in model.moe_layers for name, shape in buffers.items()}


def parameter_counts(model: ModelConfig, active: bool) -> dict[str, int]:
    """See `ModelConfig.parameter_counts`."""
    assert model.vocab_size is not None, "vocab_size is resolved from the tokenizer first"
    used = min(model.router.active_experts(model), model.num_local_experts) if active else model.num_local_experts
    sparse = model.num_moe_layers
    counts: dict[str, int] = {"embed_tokens": model.vocab_size * model.hidden_size}
    for experts, blocks in ((True, sparse), (False, model.num_hidden_layers - sparse)):
        for part, own in _block_parts(model, experts).items():
            number = blocks * sum(math.prod(shape) for shape in own.values())
            if part == "experts":
                number = number * used // model.num_local_experts  # experts of different width: of their mean one
            if number or part not in ("shared_experts", "dense_mlp"):
                counts[part] = counts.get(part, 0) + number
    counts["norms"] = counts.pop("norms") + model.hidden_size
    counts["lm_head"] = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return counts

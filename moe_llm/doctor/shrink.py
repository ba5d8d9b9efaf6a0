"""A run's configuration in small. Sizes shrink; whatever can be wrong independently of size stays."""

import math
import re
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from moe_llm.config import Config, ModelConfig
from moe_llm.config.data import DataConfig
from moe_llm.config.distill import DistillConfig
from moe_llm.config.load import validate
from moe_llm.config.preference import PreferenceConfig

LENGTH, WIDTH, LAYERS, HEAD, KV_HEADS, EXPERTS, ROUNDS, MICRO = 40, 96, 2, 8, 2, 64, 2, 2
# On the user's own ranks and devices: parameters in all, tokens of all ranks' micro-batches, the shortest blocks
PARAMETERS, TOKENS, SHORTEST = 50_000_000, 8192, 64
_INIT_LIMIT = 0.2
# keys of which a change goes without saying, or is said in a note
_UNTOLD = (
    "device",
    "max_tokens",
    "on_nan",
    "early_stopping",
    "sources",
    "validation_sources",
    "overlong",
    "chat_template",
)
# the layout of one process
ALONE = {"expert_parallel_size": 1, "sequence_parallel_size": 1, "zero_stage": 1, "engine": "auto"}


@dataclass(frozen=True)
class Small:
    """config: of the ranks; alone: of the one process that takes the ranks' micro-batches together; changes: what
    the user's configuration says -> what it is here; notes: where the comparison leaves the user's features."""

    config: Config
    alone: Config
    changes: dict[str, tuple[Any, Any]]
    notes: list[str]


def shrink(config: Config, ranks: int, steps: int, *, as_wide: bool = False) -> Small:
    """The configuration in small, for `ranks` ranks and `steps` steps; text and tokenizer are not decided here.

    Args:
        as_wide: reduce the depth, and widths by halves only as far as `PARAMETERS` asks for it; keep the device.

    Kept: experts (up to 64) and top-k, query heads for each key and value head, ties, window, packing, router and its
    losses, precision, recomputation, optimizer, schedule, decay, ZeRO stage, engine, dtype on disk. The ranks that
    share a set of experts are as many as divide `ranks`.
    """
    notes: list[str] = []
    length = _length(config, ranks if as_wide else None)
    sizes = _wide_sizes(config) if as_wide else _narrow_sizes(config)
    model = _model(config, ranks, length, sizes, notes)
    sequence_parallel = _sequence_parallel(config, model, ranks, notes)
    train = _train(config, ranks // sequence_parallel)
    expert_parallel = fitting_expert_parallel(config.parallel.expert_parallel_size, model["num_local_experts"], ranks)
    if expert_parallel != config.parallel.expert_parallel_size:
        notes.append(
            f"parallel.expert_parallel_size={config.parallel.expert_parallel_size} is {expert_parallel} here, "
            f"the most that {ranks} ranks allow: raise --ranks to see more"
        )
    raw = config.model_dump(mode="json")
    changed = {
        "model": model,
        "data": {"sequence_length": length // sequence_parallel * sequence_parallel},
        "optim": {"warmup_steps": min(config.optim.warmup_steps, 1)},
        "finetune": _finetune(config, model["num_local_experts"], notes),
        # a step that is not finite is a finding, not one to leave out
        "train": {
            **train,
            "max_steps": steps,
            "max_tokens": None,
            "device": config.train.device if as_wide else "cpu",
            "on_nan": "stop",
            "early_stopping": {},
        },
        "parallel": {"expert_parallel_size": expert_parallel, "sequence_parallel_size": sequence_parallel},
        "checkpoint": {
            "every_steps": max(1, steps // 2),
            "keep_last": None,
            "resume": "auto",
            "ema": _average(config),
        },
        "evaluate": {"every_steps": None, "max_blocks": 8, "sample_prompt": None},
        "logging": {"every_steps": 1, "console": "off", "wandb": "off"},
    }
    if config.distill.teachers:
        changed["distill"] = DistillConfig().model_dump(mode="json")
        notes.append(
            "distill is left out here, since the copy has a vocabulary of its own: its loss is that of the text alone"
        )
    if config.data.has_preference:
        changed |= _without_pairs(config, changed["data"])
        notes.append(
            f"preference.loss={config.preference.loss} is left out here: the copy learns from the texts of the pairs, and "
            "the loss of pairs is not judged"
        )
    changes = {
        f"{section}.{key}": (raw[section][key], value)
        for section in ("model", "data", "train", "parallel")
        for key, value in changed[section].items()
        if _said(raw[section][key]) != _said(value) and key not in _UNTOLD
    }
    small = validate({name: {**raw[name], **changed.get(name, {})} for name in raw})
    return Small(small, one_process(small, ranks), changes, notes)


def _without_pairs(config: Config, data: dict[str, Any]) -> dict[str, Any]:
    """The sections in which a run on pairs of answers is one on text; which text that is is decided elsewhere."""
    text = [{"type": "python_stdlib", "weight": source.weight} for source in config.data.sources]
    held_out = [{"type": "python_stdlib"} for _ in config.data.validation_sources]
    plain = {key: DataConfig.model_fields[key].default for key in ("overlong", "chat_template")}
    return {
        "data": {**data, **plain, "sources": text, "validation_sources": held_out},
        "preference": PreferenceConfig().model_dump(mode="json"),
    }


def _said(value: Any) -> Any:
    """A value without the keys that say nothing."""
    return {key: said for key, said in value.items() if said is not None} if isinstance(value, dict) else value


def one_process(config: Config, ranks: int) -> Config:
    """One process whose micro-batches are the ranks' taken together, so that its rounds are theirs.

    With `router_aux_loss_scope: transformers` each rank's micro-batch has a balance loss of its own, by definition;
    one process then takes them one by one.
    """
    readers = ranks // config.parallel.sequence_parallel_size
    together = 1 if config.model.router_aux_loss_scope == "transformers" else readers
    return replace(
        config,
        train={"micro_batch_size": config.train.micro_batch_size * together},
        parallel=ALONE,
    )


def replace(config: Config, **sections: dict[str, Any]) -> Config:
    """A copy with some values of some sections changed, validated."""
    raw = config.model_dump(mode="json")
    return validate({name: {**raw[name], **sections.get(name, {})} for name in raw})


def in_fp32(config: Config, **sections: dict[str, Any]) -> Config:
    """The same run with fp32 weights, gradients and masters, and other changes."""
    fp32 = {
        "train": {"precision": "fp32"},
        "parallel": {"gradient_dtype": "fp32"},
        "optim": {"master_weights": "fp32"},
    }
    merged = {name: {**fp32.get(name, {}), **sections.get(name, {})} for name in fp32.keys() | sections.keys()}
    return replace(config, **merged)


def fitting_expert_parallel(asked: int, experts: int, ranks: int) -> int:
    """The largest size up to `asked` that divides ranks and experts."""
    return max(size for size in range(1, asked + 1) if ranks % size == 0 and experts % size == 0)


def _sequence_parallel(config: Config, model: dict[str, Any], ranks: int, notes: list[str]) -> int:
    """The largest size up to the user's that divides the ranks and the heads of the small model."""
    asked, heads, kv = (
        config.parallel.sequence_parallel_size,
        model["num_attention_heads"],
        model["num_key_value_heads"],
    )
    size = max(
        size
        for size in range(1, asked + 1)
        if ranks % size == 0 and heads % size == 0 and (kv % size == 0 or size % kv == 0)
    )
    if size != asked:
        notes.append(f"parallel.sequence_parallel_size={asked} is {size} here, the most that ranks and heads allow")
    return size


def _average(config: Config) -> dict[str, Any]:
    """The same average from the first step on, since there are few."""
    decay = config.checkpoint.ema.decay
    return {} if decay is None else {"decay": decay}


def _length(config: Config, own_ranks: int | None) -> int:
    """own_ranks: the user's, where the copy is as wide as his."""
    longest = LENGTH if own_ranks is None else max(SHORTEST, TOKENS // (own_ranks * MICRO * ROUNDS) // 8 * 8)
    return min(config.data.sequence_length, longest)


def _train(config: Config, readers: int) -> dict[str, Any]:
    """Several rounds where the user accumulates on this many ranks that read blocks of their own, one where not; at most two rows a micro-batch."""
    train = config.train
    rounds = max(1, min(ROUNDS, train.global_batch_size // (train.micro_batch_size * readers)))
    micro = min(train.micro_batch_size, MICRO)
    adversarial = train.adversarial.model_dump(mode="json")
    if adversarial["router_every"] is not None:
        adversarial["router_every"] = 2  # so that few steps see both turns
    return {"micro_batch_size": micro, "global_batch_size": micro * rounds * readers, "adversarial": adversarial}


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int


def _narrow_sizes(config: Config) -> _Sizes:
    """A few dozen wide, whatever the user's."""
    model = config.model
    group = model.num_attention_heads // model.kv_heads
    kv = max(1, min(model.kv_heads, KV_HEADS, 16 // group))
    heads = kv * group
    head = min(model.attention_head_dim, HEAD if heads * HEAD <= WIDTH else HEAD // 2)
    if model.latent_attention:
        kv, head = heads, max(4, head // 4 * 4)
    width = heads * head * model.hidden_size / (model.num_attention_heads * model.attention_head_dim)
    step = math.lcm(2, model.router.parts_per_token, heads if model.latent_attention else 1)
    hidden = min(model.hidden_size, max(-(-8 // step) * step, step * round(width / step)))
    intermediate = max(4, round(hidden * min(2.0, model.intermediate_size / model.hidden_size)))
    return _Sizes(hidden, min(model.intermediate_size, intermediate), heads, kv, head)


def _wide_sizes(config: Config) -> _Sizes:
    """The user's, halved until there are few enough parameters; multiples of 64 stay multiples of 64, since kernels go
    by that."""
    model = config.model
    group, halvings = model.num_attention_heads // model.kv_heads, 0
    while True:
        share = 2**halvings
        kv = max(1, model.kv_heads // share)
        sizes = _Sizes(
            _halved(model.hidden_size, share, model.router.parts_per_token),
            _halved(model.intermediate_size, share, 1),
            kv * group,
            kv,
            model.attention_head_dim,
        )
        if _parameters(config, sizes) <= PARAMETERS or share >= model.hidden_size:
            return sizes
        halvings += 1


def _halved(size: int, share: int, parts: int) -> int:
    step = math.lcm(2, parts) if size % 64 else math.lcm(64, parts)
    return size if share == 1 else max(step, size // share // step * step)


def _parameters(config: Config, sizes: _Sizes) -> int:
    small = config.model.model_copy(
        update={
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head,
            "num_hidden_layers": min(config.model.num_hidden_layers, LAYERS),
            "vocab_size": config.model.vocab_size or 1024,
        }
    )
    return small.num_params()


def _model(config: Config, ranks: int, length: int, sizes: _Sizes, notes: list[str]) -> dict[str, Any]:
    model, hidden = config.model, sizes.hidden
    scale = math.sqrt(model.hidden_size / hidden)  # narrower layers keep the size of what they put out
    experts = _experts(config, ranks, length)
    mixed = model.router.shrunk(model, experts, length)
    if model.init_from is not None:
        notes.append(f"model.init_from={model.init_from} is not loaded: the copy is smaller, with random weights")
    shape = {
        "init_from": None,
        "hidden_size": hidden,
        "intermediate_size": sizes.intermediate,
        **_layers(model),
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": None if model.latent_attention else sizes.head,
        **_latent(model, sizes),
        "rope_parameters": _rope(model, sizes),
        "num_local_experts": experts,
        "expert_sizes": _expert_sizes(model, experts, sizes.intermediate),
        "expert_activations": model.expert_activations and list(model.expert_activations[:experts]),
        "sliding_window": _window(config, length),
        **mixed,
        "router": {**model.router.model_dump(mode="json"), **model.router.quiet(), **mixed.get("router", {})},
        "router_jitter_noise": 0.0,
        "expert_dropout": 0.0,
        "initializer_range": max(model.initializer_range, min(_INIT_LIMIT, model.initializer_range * scale)),
    }
    if model.router_jitter_noise:
        notes.append(
            f"model.router_jitter_noise={model.router_jitter_noise:g} is off where layouts are compared, since each "
            "rank draws its own; rows of their own check it"
        )
    for key, value in model.router.quiet().items():
        if getattr(model.router, key) != value:
            notes.append(
                f"model.router.{key}={getattr(model.router, key)} is {value} here, since each rank draws its own"
            )
    if model.expert_dropout:
        notes.append(
            f"model.expert_dropout={model.expert_dropout:g} is off here, since each rank draws its own: the experts "
            "are those of a run without it"
        )
    if shape["num_local_experts"] != model.num_local_experts:
        notes.append(f"model.num_local_experts={model.num_local_experts} is {shape['num_local_experts']} here")
    return shape


def _expert_sizes(model: ModelConfig, experts: int, width: int) -> list[int] | None:
    """Widths in the same proportion to each other."""
    if model.expert_sizes is None:
        return None
    return [max(1, round(size * width / model.intermediate_size)) for size in model.expert_sizes[:experts]]


def _layers(model: ModelConfig) -> dict[str, Any]:
    """So many blocks that every kind of the user's is there: the first of them without experts where any is, and both kinds
    of window where both are."""
    layers, dense = min(model.num_hidden_layers, LAYERS), model.num_moe_layers < model.num_hidden_layers
    shape: dict[str, Any] = {
        "num_hidden_layers": layers,
        "moe_layer_frequency": 1,
        "first_k_dense_replace": 0,
        "mlp_only_layers": [0] if dense else [],
        "layer_types": None,
    }
    if dense and model.dense_intermediate_size is not None:
        shape["dense_intermediate_size"] = min(model.dense_intermediate_size, 2 * WIDTH)
    if model.layer_types is not None:
        kinds = list(dict.fromkeys(model.layer_types))
        shape["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    return shape


def _latent(model: ModelConfig, sizes: _Sizes) -> dict[str, Any]:
    """Multi-head latent attention of narrower heads, half of each turned; nothing where they are as wide as the user's."""
    if not model.latent_attention or sizes.head == model.attention_head_dim:
        return {}
    assert model.kv_lora_rank is not None
    return {
        "kv_lora_rank": min(model.kv_lora_rank, HEAD),
        "q_lora_rank": None if model.q_lora_rank is None else min(model.q_lora_rank, HEAD),
        "qk_nope_head_dim": sizes.head // 2,
        "qk_rope_head_dim": sizes.head // 2,
        "v_head_dim": min(model.v_head_dim, sizes.head),
    }


def _rope(model: ModelConfig, sizes: _Sizes) -> dict[str, Any]:
    """The same scaling; of a narrower head perhaps another share, so that pairs are turned."""
    head = _latent(model, sizes).get(
        "qk_rope_head_dim", model.rotary_head_dim if model.latent_attention else sizes.head
    )
    rope = model.rope_parameters.model_dump(mode="json", exclude_none=True)
    turned = int(head * rope["partial_rotary_factor"])
    return rope if turned % 2 == 0 and turned >= 4 else {**rope, "partial_rotary_factor": 1.0 if head <= 8 else 0.5}


def _experts(config: Config, ranks: int, length: int) -> int:
    """All of them up to 64; beyond, what the ranks divide as they divide the user's, and the router's groups too."""
    model = config.model
    if model.num_local_experts <= EXPERTS:
        return model.num_local_experts
    size = fitting_expert_parallel(config.parallel.expert_parallel_size, model.num_local_experts, ranks)
    least = max(EXPERTS, model.num_experts_per_tok)
    for experts in range(-(-least // size) * size, model.num_local_experts, size):
        if model.router.shrunk(model, experts, length):
            return experts  # it brings itself into line
        try:
            model.router.check(model.model_copy(update={"num_local_experts": experts}))
        except PydanticCustomError:
            continue  # groups that this number does not divide into, or leaves too small
        return experts
    return model.num_local_experts


def _finetune(config: Config, experts: int, notes: list[str]) -> dict[str, Any]:
    """The same parts are trained, in every layer that is left: patterns that name one stand for all."""
    train, some = config.finetune.trainable, config.finetune.experts
    if not isinstance(train, str):
        train = list(dict.fromkeys(re.sub(r"\blayers\.[^.]+", "layers.*", pattern) for pattern in train))
    if some is not None and max(some) >= experts:
        some = sorted({expert % experts for expert in some})
    if (train, some) != (config.finetune.trainable, config.finetune.experts):
        notes.append(
            f"finetune.trainable={config.finetune.trainable} with experts={config.finetune.experts} is {train} with "
            f"experts={some} here, where there are fewer layers or experts"
        )
    # what is frozen stays frozen; the rest of the guard needs a base
    guard = {"action": "freeze"} if config.finetune.router_guard.action == "freeze" else {}
    return {"trainable": train, "experts": some, "router_guard": guard, "lora": _lora(config, experts, notes)}


def _lora(config: Config, experts: int, notes: list[str]) -> dict[str, Any]:
    """Adapters of the same parts, times the same factor; of a rank that narrow layers have room for."""
    lora = config.finetune.lora
    if lora.rank is None:
        return {}
    if lora.dropout:
        notes.append(f"finetune.lora.dropout={lora.dropout:g} is off here, since each rank draws its own")
    rank = min(lora.rank, 4, experts)
    targets = list(dict.fromkeys(re.sub(r"\blayers\.[^.]+", "layers.*", target) for target in lora.targets))
    return {"rank": rank, "alpha": lora.scale * rank, "dropout": 0.0, "targets": targets}


def _window(config: Config, length: int) -> int | None:
    """A window that cuts a block short as the user's does; one that never bites stays one."""
    window = config.model.sliding_window
    if window is None or length == config.data.sequence_length:
        return window
    if window >= config.data.sequence_length:
        return length
    return max(2, min(length // 2, round(window * length / config.data.sequence_length)))

"""What a checkpoint's files say, read with json, safetensors and transformers alone."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

_DTYPES = {"fp32": ("float32", "F32"), "bf16": ("bfloat16", "BF16"), "fp16": ("float16", "F16")}
# configuration keys that decide what a model computes, by the names that transformers gives them
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "num_experts_per_tok",
)


def wrong_fields(directory: Path, model: Any, dtype: str) -> list[str]:
    """Where config.json does not describe the model that was trained."""
    found = _read(directory / "config.json")
    due = {name: getattr(model, name) for name in _FIELDS}
    if found.get("model_type") == "mistral":  # of one expert, which it does not count
        del due["num_experts_per_tok"]
    due |= {"num_key_value_heads": model.num_key_value_heads or model.num_attention_heads}
    due |= {"head_dim": model.head_dim or model.hidden_size // model.num_attention_heads}
    if model.kv_lora_rank is not None:
        due |= {"head_dim": model.qk_rope_head_dim}
        due |= {key: getattr(model, key) for key in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim")}
    due |= {"dtype": _DTYPES[dtype][0]}
    wrong = [
        f"{name} is {found.get(name)!r}, trained as {value!r}"
        for name, value in due.items()
        if found.get(name) != value
    ]
    rope = found.get("rope_parameters") or {}
    for place, value in (("rope_theta", found.get("rope_theta")), ("rope_parameters", rope.get("rope_theta"))):
        if value != model.rope_theta:
            wrong.append(f"{place} has the base {value!r}, trained as {model.rope_theta!r}")
    for key, value in model.rope_parameters.content().items():
        if rope.get(key, 1.0 if key == "partial_rotary_factor" else None) != value:
            wrong.append(f"rope_parameters.{key} is {rope.get(key)!r}, trained as {value!r}")
    window = found.get("sliding_window") if found.get("use_sliding_window", True) else None
    if window != model.sliding_window:
        wrong.append(f"sliding_window is {window!r}, trained as {model.sliding_window!r}")
    return wrong


def wrong_tokens(directory: Path) -> list[str]:
    """Where the model's files and the tokenizer beside them disagree about special tokens or the vocabulary."""
    from transformers import AutoTokenizer, PreTrainedConfig

    tokenizer = AutoTokenizer.from_pretrained(str(directory), config=PreTrainedConfig(), trust_remote_code=False)
    config, wrong = _read(directory / "config.json"), []
    for file in ("config.json", "generation_config.json"):
        said = _read(directory / file)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            of_model, of_tokenizer = said.get(name), getattr(tokenizer, name)
            known = of_model if isinstance(of_model, list) else [of_model]
            if of_model is not None and of_tokenizer is not None and of_tokenizer not in known:
                wrong.append(f"{name} is {of_model} in {file} and {of_tokenizer} in the tokenizer")
            if name == "eos_token_id" and of_model is None:
                wrong.append(f"{file} has no eos_token_id, so that generation does not end")
    if config["vocab_size"] < len(tokenizer):
        wrong.append(f"vocab_size is {config['vocab_size']}, and the tokenizer has {len(tokenizer)} tokens")
    return wrong


def wrong_dtypes(directory: Path, dtype: str, in_fp32: Collection[str] = ()) -> list[str]:
    """Tensors that are stored in another dtype than `dtype`.

    Args:
        in_fp32: ends of the names of those that stay in fp32 whatever it is.
    """
    due, wrong = _DTYPES[dtype][1], []
    for file in sorted(directory.glob("model*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, record in header.items():
            if name == "__metadata__":
                continue
            expected = "F32" if name.endswith(tuple(in_fp32)) and in_fp32 else due
            if record["dtype"] != expected:
                wrong.append(f"{name} is stored as {record['dtype']}, not {expected}")
    return wrong


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))

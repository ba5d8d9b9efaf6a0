"""A Qwen2-MoE checkpoint without biases as one that vLLM loads, whose Qwen2-MoE always has them: zeros.

    python scripts/to_vllm.py CHECKPOINT OUT

OUT has links to the checkpoint's files where the file system has them, copies else, one more file of weights with biases of
queries, keys and values that are zero, and `qkv_bias: true`. transformers and this package read it too, with the same
logits. Training from it would train the biases.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BIASES = "model-zero-biases.safetensors"
INDEX = "model.safetensors.index.json"
_RENAMED = {"model.safetensors": "model-weights.safetensors"}  # a file of that name is read alone, without the index
LEFT_OUT = ("trainer", "ema")  # of training alone


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    checkpoint, out = (Path(word) for word in sys.argv[1:])
    if not (checkpoint / "config.json").is_file():
        raise SystemExit(f"{checkpoint / 'config.json'} is missing: give a checkpoint directory")
    if out.exists():
        raise SystemExit(f"{out} exists: name a new directory")
    content = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if content.get("model_type") != "qwen2_moe" or content.get("qkv_bias"):
        raise SystemExit(
            f"{checkpoint} is of {content.get('model_type')} with qkv_bias={content.get('qkv_bias')}: vLLM takes it as it is"
        )
    hidden, heads = content["hidden_size"], content["num_attention_heads"]
    if content.get("head_dim") not in (None, hidden // heads):
        raise SystemExit(
            f"{checkpoint} has head_dim={content['head_dim']}, and vLLM's Qwen2-MoE takes hidden_size / num_attention_heads = "
            f"{hidden // heads}: serve it by transformers or llama.cpp"
        )
    weight_map, zeros = _weights(checkpoint)
    out.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.is_file() and file.name not in ("config.json", INDEX):
            _link(file, out / _RENAMED.get(file.name, file.name))
        elif file.is_dir() and file.name not in LEFT_OUT:
            shutil.copytree(file, out / file.name)
    save_file(zeros, out / BIASES, metadata={"format": "pt"})
    content["qkv_bias"] = True
    if "moe_llm" in content:
        content["moe_llm"]["attention_bias"] = "qkv"
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weight_map |= dict.fromkeys(zeros, BIASES)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    print(f"written: {out} ({len(zeros)} biases)")


def _weights(checkpoint: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The file of each tensor, and the biases that are missing."""
    index = checkpoint / INDEX
    if index.is_file():
        files = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    else:
        files = ["model.safetensors"]
    weight_map: dict[str, str] = {}
    zeros: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(checkpoint / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                weight_map[name] = _RENAMED.get(file, file)
                if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                    weight = tensors.get_slice(name)
                    bias = torch.zeros(weight.get_shape()[0], dtype=weight[:1].dtype)
                    zeros[name.removesuffix("weight") + "bias"] = bias
    return weight_map, zeros


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    main()

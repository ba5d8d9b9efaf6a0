"""Tiny checkpoints of transformers' own, in the layouts that are about, and merges of them."""

import json
from pathlib import Path

import safetensors.torch
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig

from moe_llm.families import hf
from moe_llm.merge.recipe import parse_recipe
from moe_llm.merge.run import merge_recipe

SIZES = {
    "vocab_size": 24, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {"mixtral": MixtralConfig, "llama": LlamaConfig, "mistral": MistralConfig}


def make_model(kind: str = "mixtral", seed: int = 0, base=None, step: float = 0.1, **changes):
    """A model of random weights of some size, or a fine-tune of `base`: its weights plus noise of `step`."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    torch.manual_seed(seed)
    config = CONFIGS[kind](**{**SIZES, **experts, **changes})
    config._experts_implementation = "eager"  # the others want wider rows
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_() if base is None else parameter.copy_(
                base.state_dict()[name] + step * torch.randn_like(parameter)
            )
    return model.eval()


def save(model, directory: Path, layout: str = "published", dtype: torch.dtype | None = None, shards: int = 1) -> str:
    """Write a checkpoint; `layout` of a mixture's experts: `published`, or `stacked` under transformers 5's names."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    if model.config.model_type == "mixtral" and layout == "published":
        state = {
            piece.name: tensor[piece.index].contiguous()
            for name, tensor in state.items() for piece in hf.pieces(name, tuple(tensor.shape))
        }  # fmt: skip
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    write_shards(directory, state, shards)
    return str(directory)


def write_shards(directory: Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        safetensors.torch.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[i::shards])
        safetensors.torch.save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def merged(recipe: dict | str, out: Path, **options) -> dict[str, torch.Tensor]:
    """Carry a recipe out; the output as transformers loads it, strictly."""
    content = yaml.safe_load(recipe) if isinstance(recipe, str) else recipe
    merge_recipe(parse_recipe(content), out, say=options.pop("say", lambda _: None), **options)
    return load(out)


def load(directory: Path) -> dict[str, torch.Tensor]:
    """The state of a checkpoint in transformers; no key may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


def model_list(*references: str, **parameters) -> list[dict]:
    """The `models` of a recipe; a parameter is one value for all or a list of one for each."""
    return [
        {"model": ref, "parameters": {k: v[i] if isinstance(v, list) else v for k, v in parameters.items()}}
        for i, ref in enumerate(references)
    ]


WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat", "and", "dog", "ran"]


class Words:
    """Builds tokenizers of whole words, in the order given."""

    def __init__(self, words=WORDS):
        self.words, self.size = list(words), len(words)

    def save(self, directory: Path | str) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {word: i for i, word in enumerate(self.words)}
        raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        tokenizer.save_pretrained(directory)

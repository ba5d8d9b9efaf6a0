"""Dense models to a mixture (mergekit's MoE script): their feed-forward layers become experts of the base.

A router row is a direction: a token goes where the inner product is large. `cheap_embed` takes the prompts' token
embeddings, the same for every layer; `hidden` the base's hidden states at each layer, of the last token of each
prompt (`hidden_avg`: the mean over tokens), from one run of the base. What negative prompts give is taken off, and
rows have length 1. `random` and `uniform_random` need training afterwards.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.merge.job import SPAN, Copy, seeded
from moe_llm.merge.models import ATTENTION, DENSE, EMBEDDING, HEAD, NORM, Model, check_alike, layer_tensor, window
from moe_llm.merge.plan import MergePlan, common_dtype, read_dtype
from moe_llm.merge.recipe import Expert, MixtureRecipe
from moe_llm.merge.rows import gather
from moe_llm.merge.vocabulary import load_tokenizer

UP, GATE, DOWN = DENSE


def make_mixture_plan(recipe: MixtureRecipe) -> MergePlan:
    """Open the models and lay out the mixture.

    Raises:
        UserError: whatever is wrong with the recipe or the models, before anything is written.
    """
    names = dict.fromkeys([recipe.base_model, *(expert.source_model for expert in recipe.experts)])
    models = {name: Model(name) for name in names}
    base = models[recipe.base_model]
    notes = check_alike(list(models.values()))
    _check(base, list(models.values()))
    dtype = read_dtype(recipe.dtype, "dtype") or common_dtype(
        [model.dtype(layer_tensor(0, GATE)) for model in models.values()]
    )
    changes = _changes(recipe, base)
    kept = {key: value for key, value in base.content.items() if key not in hf.DENSE_ALONE}
    hf.from_transformers_config({**kept, **changes}, str(base.directory / "config.json"))  # refused now if at all
    gates_LED = _gates(recipe, base)
    return MergePlan(
        "mixtral",
        base,
        list(models.values()),
        list(_tensors(recipe, base, models, gates_LED, dtype)),
        changes,
        left_out=hf.DENSE_ALONE,
        notes=notes,
    )


def _check(base: Model, models: list[Model]) -> None:
    for model in models:
        if len(set(model.content.get("layer_types") or ())) > 1:
            raise UserError(
                f"{model.reference} has layers of several layer_types, which a Mixtral has not: give another"
            )
        if model.config is not None:
            raise UserError(f"{model.reference} is a mixture already: experts are made of Llama or Mistral models")
        if model.layers != base.layers:
            raise UserError(
                f"{model.reference} has {model.layers} layers and {base.reference} {base.layers}: give equal models"
            )
        if biases := [name for name in model.shapes if name.endswith(".bias")]:
            raise UserError(f"{model.reference} has {biases[0]}, and a Mixtral has no biases: give a model without")
        for name in (layer_tensor(i, suffix) for i in range(base.layers) for suffix in DENSE):
            if model.shapes[name] != base.shapes[name]:
                raise UserError(
                    f"{name} is {list(base.shapes[name])} in {base.reference} and {list(model.shapes[name])} in "
                    f"{model.reference}: give models of one shape"
                )


def _changes(recipe: MixtureRecipe, base: Model) -> dict[str, Any]:
    """Of the base's config.json, to one of a Mixtral; a window of attention stays, which mergekit drops."""
    heads = base.content["num_attention_heads"]
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": len(recipe.experts), "num_experts_per_tok": recipe.experts_per_token,
        "num_key_value_heads": base.content.get("num_key_value_heads") or heads,
        "head_dim": base.content.get("head_dim") or base.content["hidden_size"] // heads,
        "sliding_window": window(base.content), "output_router_logits": False,
        # what leaving these out means differs between the two configurations
        "rms_norm_eps": base.content.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": base.content.get("max_position_embeddings", 2048),
        **({} if "rope_theta" in base.content or base.content.get("rope_parameters") else {"rope_theta": 10000.0}),
    }  # fmt: skip


def _tensors(
    recipe: MixtureRecipe, base: Model, models: dict[str, Model], gates_LED: torch.Tensor, dtype: torch.dtype
) -> Iterator[Copy]:
    def same(name: str) -> Copy:
        return Copy(name, base.shapes[name], dtype, lambda: _spans(base, name))

    E, (F, D) = len(recipe.experts), base.shapes[layer_tensor(0, GATE)]
    yield same(EMBEDDING)
    for i in range(base.layers):
        for suffix in ATTENTION:
            yield same(layer_tensor(i, suffix))
        sources = [(expert, models[expert.source_model], e) for e, expert in enumerate(recipe.experts)]
        for name, shape, suffixes in (("gate_up_proj", (E, 2 * F, D), (GATE, UP)), ("down_proj", (E, D, F), (DOWN,))):
            parts = partial(_expert_spans, recipe.seed, sources, [layer_tensor(i, suffix) for suffix in suffixes])
            yield Copy(layer_tensor(i, f"mlp.experts.{name}"), shape, dtype, parts)
        yield Copy(layer_tensor(i, "mlp.gate.weight"), (E, D), dtype, partial(_whole, gates_LED[i]))
    yield same(NORM)
    if not base.tied:
        yield same(HEAD)


def _whole(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor.reshape(-1)


def _spans(model: Model, name: str) -> Iterator[torch.Tensor]:
    total = math.prod(model.shapes[name])
    for start in range(0, total, SPAN):
        yield model.read(name, start, min(start + SPAN, total))


def _expert_spans(seed: int, sources: list[tuple[Expert, Model, int]], names: list[str]) -> Iterator[torch.Tensor]:
    for expert, model, e in sources:
        for name in names:
            generator = seeded(seed, name, e)
            for part in _spans(model, name):
                if expert.noise_scale:
                    part = part.float() + torch.randn(len(part), generator=generator) * expert.noise_scale
                if expert.residual_scale is not None and name.endswith(DOWN):
                    part = part * expert.residual_scale
                yield part


def _gates(recipe: MixtureRecipe, base: Model) -> torch.Tensor:
    """Router rows, (L, E, D) in fp32."""
    L, E, D = base.layers, len(recipe.experts), base.shapes[EMBEDDING][1]
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.gate_mode == "random":
        return torch.randn(L, E, D, generator=generator)
    if recipe.gate_mode == "uniform_random":  # as torch initialises a linear layer
        return (torch.rand(L, E, D, generator=generator) * 2 - 1) / math.sqrt(D)
    tokenizer = load_tokenizer(base.directory)
    if recipe.gate_mode == "cheap_embed":

        def represent(prompts: list[str]) -> torch.Tensor:
            return _embedded(base, [i for prompt in prompts for i in _encode(tokenizer, prompt)])
    else:
        network = _network(base)

        def represent(prompts: list[str]) -> torch.Tensor:
            whole = recipe.gate_mode == "hidden_avg"
            states = [_hidden(network, _encode(tokenizer, prompt), whole) for prompt in prompts]
            return torch.stack(states).mean(0)

    rows = []
    for expert in recipe.experts:
        assert expert.positive_prompts, "a gate by prompts has some for each expert"
        row_LD = represent(expert.positive_prompts)
        if expert.negative_prompts:
            row_LD = row_LD - represent(expert.negative_prompts)
        rows.append(torch.nn.functional.normalize(row_LD, dim=-1, eps=1e-8))
    return torch.stack(rows, dim=1)


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no tokens: give a text")
    return ids


def _embedded(base: Model, ids: list[int]) -> torch.Tensor:
    """Sum of the tokens' embeddings, of length 1, for each layer: (L, D)."""
    row_D = gather(base, EMBEDDING, torch.tensor(ids)).float().sum(0)
    return torch.nn.functional.normalize(row_D, dim=0, eps=1e-8).expand(base.layers, -1)


@torch.no_grad()
def _hidden(network: Any, ids: list[int], whole: bool) -> torch.Tensor:
    """What enters each layer, at the last token or, with `whole`, as the mean over all: (L, D)."""
    states_LSD = torch.cat(network(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1]).float()
    return states_LSD.mean(1) if whole else states_LSD[:, -1]


def _network(base: Model) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base.directory, dtype="auto", local_files_only=True).eval()

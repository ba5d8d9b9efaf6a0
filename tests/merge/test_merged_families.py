"""Exports of this package in other architectures than plain Mixtral are merged as they are."""

import json

import pytest
import torch
from merge_fakes import model_list
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.merge.recipe import parse_recipe
from moe_llm.merge.run import merge_recipe

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "max_position_embeddings": 32,
}
SHARED = {"num_shared_experts": 1}
CASES = {
    "noisy_top_k": ({"type": "noisy_top_k"}, {}, "mixtral"),
    "qwen2_moe": ({"type": "deepseek_moe"}, {**SHARED, "shared_expert_gate": True, "attention_bias": "qkv"}, "qwen2_moe"),
    "qwen3_moe": ({"type": "mixtral"}, {"qk_norm": "head"}, "qwen3_moe"),
    "glm4_moe": ({"type": "bias_balanced"}, SHARED, "glm4_moe"),
}  # fmt: skip


def make(router: dict, more: dict, seed: int) -> MoEForCausalLM:
    model = MoEForCausalLM(ModelConfig(**{**SIZES, **more, "router": router}))
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    router, more, architecture = CASES[request.param]
    models = [make(router, more, seed) for seed in (0, 1)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"m{i}")
    return models, [str(tmp_path / f"m{i}") for i in (0, 1)], architecture


def merge(tmp_path, recipe):
    merge_recipe(parse_recipe(recipe), tmp_path / "out", say=lambda _: None)
    return MoEForCausalLM.from_pretrained(tmp_path / "out")


def test_the_mean_of_two_is_the_mean_of_each_tensor_and_transformers_computes_the_same(pair, tmp_path):
    models, paths, architecture = pair
    found = merge(tmp_path, {"merge_method": "linear", "models": model_list(*paths, weight=0.5)})
    states = [model.state_dict() for model in models]
    assert found.state_dict().keys() == states[0].keys()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2, msg=name)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == architecture
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    ids = torch.tensor([[1, 5, 9, 2, 7]])
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, found(ids).logits, rtol=1e-5, atol=1e-5)


def test_routers_buffers_stay_in_fp32_whatever_the_dtype(tmp_path):
    router, more, _ = CASES["glm4_moe"]
    model = make(router, more, 0)
    model.save_pretrained(tmp_path / "m0")
    found = merge(
        tmp_path,
        {"merge_method": "linear", "models": model_list(str(tmp_path / "m0"), weight=1.0), "dtype": "bfloat16"},
    )
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(found.state_dict()[name], model.state_dict()[name])
    assert found.lm_head.weight.dtype == torch.bfloat16


def test_a_noisy_model_that_transformers_has_saved_is_merged_and_loaded(tmp_path):
    models = [make(*CASES["noisy_top_k"][:2], seed) for seed in (0, 1)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"m{i}")
        AutoModelForCausalLM.from_pretrained(tmp_path / f"m{i}").save_pretrained(tmp_path / f"t{i}")
    paths = [str(tmp_path / f"t{i}") for i in (0, 1)]
    found = merge(tmp_path, {"merge_method": "linear", "models": model_list(*paths, weight=0.5)})
    name = "model.layers.0.mlp.gate"
    assert not found.state_dict()[f"{name}.noise_weight"].any()
    mean = sum(model.state_dict()[f"{name}.weight"] for model in models) / 2
    torch.testing.assert_close(found.state_dict()[f"{name}.weight"], mean)


def test_experts_of_a_router_with_more_than_rows_are_not_aligned(tmp_path):
    for i in (0, 1):
        make({"type": "noisy_top_k"}, {}, i).save_pretrained(tmp_path / f"m{i}")
    paths = [str(tmp_path / f"m{i}") for i in (0, 1)]
    recipe = {"merge_method": "linear", "models": model_list(*paths, weight=0.5), "align_experts": "weights"}
    with pytest.raises(UserError, match="noise_weight: set align_experts: none"):
        merge(tmp_path, recipe)


def test_routers_of_two_kinds_are_refused(tmp_path):
    make({"type": "noisy_top_k"}, {}, 0).save_pretrained(tmp_path / "m0")
    make({"type": "gshard"}, {}, 1).save_pretrained(tmp_path / "m1")
    paths = [str(tmp_path / f"m{i}") for i in (0, 1)]
    with pytest.raises(UserError, match=r"noise_weight is in only one of"):
        merge(tmp_path, {"merge_method": "linear", "models": model_list(*paths, weight=0.5)})

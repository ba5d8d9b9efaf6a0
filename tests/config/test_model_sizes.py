"""Parameters by arithmetic equal those of the built model."""

from pathlib import Path

import pytest

from moe_llm.config import ModelConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"

SHAPES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "own head_dim": {"head_dim": 10},
    "heads of 6": {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
    "one kv head": {"num_key_value_heads": 1, "head_dim": 2},
    "kv heads by default": {"num_key_value_heads": None},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "many experts": {"num_local_experts": 13, "num_experts_per_tok": 5, "intermediate_size": 7},
}
BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_sizes_equal_those_of_transformers(shape):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = ModelConfig(**{**BASE, **shape})
    fields = {**BASE, **shape, "num_key_value_heads": config.kv_heads}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**fields))
    assert config.num_params() == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert config.parameter_counts()["experts"] == experts
    idle = experts // config.num_local_experts * (config.num_local_experts - config.num_experts_per_tok)
    assert config.num_params(active=True) == config.num_params() - idle


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
        ("mixtral_8x22b", 140_620_634_112, 39_152_031_744),
        ("dense_baseline", 3_148_224, 3_148_224),
    ],
)
def test_shipped_sizes(name, total, active):
    model = load_config(CONFIGS / f"{name}.yaml").model
    assert (model.num_params(), model.num_params(active=True)) == (total, active)
    comment = "".join(line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line[:1] == "#")
    assert f"{active:,}" in comment


def test_the_dense_baseline_differs_from_the_quickstart_in_the_experts_alone():
    quickstart, dense = (load_config(CONFIGS / f"{name}.yaml") for name in ("quickstart", "dense_baseline"))
    difference = quickstart.model.num_params(active=True) - dense.model.num_params(active=True)
    assert difference == quickstart.model.parameter_counts()["router"] * 7 // 8
    assert f"{quickstart.model.num_params(active=True):,}" in (CONFIGS / "dense_baseline.yaml").read_text()
    changed = {
        key
        for key, value in quickstart.model.model_dump().items()
        if dense.model.model_dump()[key] != value and key != "router"
    }
    assert changed == {
        "intermediate_size",
        "num_local_experts",
        "num_experts_per_tok",
        "router_aux_loss_coef",
        "router_z_loss_coef",
    }
    without = {"run", "model"}
    assert quickstart.model_dump(exclude=without) == dense.model_dump(exclude=without)

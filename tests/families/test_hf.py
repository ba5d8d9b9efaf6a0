"""The table of names and layouts, against transformers itself."""

import json

import pytest
import torch
from support.checkpoints import small_config
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.families import hf, mixtral

MISTRAL = {  # the config.json that Mistral AI published for Mixtral-8x7B-v0.1
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def exported(model: ModelConfig, **changes) -> dict:
    arguments = {"bos_token_id": 1, "eos_token_id": 2, "dtype": "fp32"} | changes
    return hf.to_transformers_config(model, **arguments)


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_transformers(tied):
    config = small_config(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**exported(config)))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == hf.parameter_shapes(config)


def test_the_published_model_has_its_published_size():
    config = hf.from_transformers_config(MISTRAL)
    sizes = [torch.Size(shape).numel() for shape in hf.parameter_shapes(config).values()]
    assert sum(sizes) == config.num_params() == 46_702_792_704


def test_pieces_of_a_rank_are_its_experts_and_cover_the_parameter():
    tensor = torch.arange(2 * 8 * 3).reshape(2, 8, 3)
    covered = torch.zeros_like(tensor)
    found = hf.pieces("model.layers.5.mlp.experts.gate_up_proj", (2, 8, 3), first_expert=6)
    for piece in found:
        assert tuple(tensor[piece.index].shape) == piece.shape == (4, 3)
        covered[piece.index] += 1
    assert (covered == 1).all()
    block = "model.layers.5.block_sparse_moe.experts"
    assert [piece.name for piece in found] == [
        f"{block}.6.w1.weight",
        f"{block}.6.w3.weight",
        f"{block}.7.w1.weight",
        f"{block}.7.w3.weight",
    ]


@pytest.mark.parametrize(
    ("memory", "published"),
    [
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_dense_names(memory, published):
    assert [piece.name for piece in hf.pieces(memory, (2, 3))] == [published]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "sliding_window": 7, "rope_theta": 12345.0, "rms_norm_eps": 1e-6},
        {"router_aux_loss_scope": "transformers", "router_z_loss_coef": 0.25, "router_jitter_noise": 0.1},
        {"num_key_value_heads": None, "head_dim": None, "num_experts_per_tok": 3, "initializer_range": 0.5},
    ],
)
def test_config_round_trip(changes):
    config = small_config(**changes)
    back = hf.from_transformers_config(json.loads(json.dumps(exported(config))))
    resolved = {"num_key_value_heads": config.kv_heads, "head_dim": config.attention_head_dim}
    assert back == config.model_copy(update=resolved)


def test_transformers_reads_the_same_architecture_and_writes_it_back(tmp_path):
    config = small_config(sliding_window=9, rope_theta=5000.0, router_jitter_noise=0.1, router_z_loss_coef=0.5)
    (tmp_path / "config.json").write_text(json.dumps(exported(config, dtype="bf16", pad_token_id=0)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, MixtralConfig)
    assert theirs.rope_parameters["rope_theta"] == 5000.0
    assert (theirs.head_dim, theirs.sliding_window, theirs.dtype) == (6, 9, torch.bfloat16)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    theirs.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert hf.from_transformers_config(again) == config


def test_the_published_config():
    config = hf.from_transformers_config(MISTRAL)
    assert (config.hidden_size, config.kv_heads, config.attention_head_dim, config.rope_theta) == (
        4096,
        8,
        128,
        1e6,
    )
    assert (config.num_local_experts, config.max_position_embeddings, config.router_aux_loss_coef) == (
        8,
        32768,
        0.02,
    )


def test_keys_left_out_mean_what_transformers_means():
    config = hf.from_transformers_config({"model_type": "mixtral"})
    theirs = MixtralConfig()
    for name in mixtral.DEFAULTS:
        ours = config.attention_head_dim if name == "head_dim" else getattr(config, name)
        assert ours == (getattr(theirs, name) or (128 if name == "head_dim" else getattr(theirs, name))), name
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "MixtralForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, "rope_theta=1000000.0"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"moe_llm": {"router": {"type": "unheard-of"}}}, "router"),
    ],
)
def test_what_the_model_cannot_be_is_refused_in_one_sentence(changes, named):
    with pytest.raises(UserError) as raised:
        hf.from_transformers_config(MISTRAL | changes, "some/config.json")
    sentence = str(raised.value)
    assert named in sentence
    assert sentence.startswith("some/config.json: ")
    assert "\n" not in sentence


def test_dropout_is_warned_of():
    with pytest.warns(UserWarning, match=r"attention_dropout=0\.1"):
        hf.from_transformers_config(MISTRAL | {"attention_dropout": 0.1})


def test_a_router_that_is_not_imported_is_refused_with_the_remedy():
    content = json.loads(json.dumps(exported(small_config(router={"type": "top_p"}))))
    content["moe_llm"]["router"]["type"] = "sigmoid"
    with pytest.raises(UserError) as raised:
        hf.from_transformers_config(content, "c/config.json")
    told = str(raised.value)
    assert told.startswith("c/config.json: router.type='sigmoid' is no known router: use one of mixtral, ")
    assert told.endswith(
        "; if it is your own, run the command by a script that imports its module, as docs/guides/own-router.md shows"
    )

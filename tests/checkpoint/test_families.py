"""Models that transformers made of other families: read, computed alike, and written as what they were."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moe_llm.checkpoint import hf
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.errors import UserError

TOKENS = torch.randint(0, 24, (3, 17), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 24,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "eos_token_id": None,
}
QWEN = {**SIZES, "moe_intermediate_size": 6, "intermediate_size": 14}
CASES = [
    Qwen3MoeConfig(**QWEN, head_dim=8, norm_topk_prob=True),
    Qwen3MoeConfig(**QWEN, head_dim=10, attention_bias=True, tie_word_embeddings=True),
    OlmoeConfig(**SIZES, intermediate_size=6),
    OlmoeConfig(**SIZES, intermediate_size=6, attention_bias=True, norm_topk_prob=True),
    Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=12),
    Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=6, norm_topk_prob=True, qkv_bias=False),
]


@pytest.fixture(params=CASES, ids=lambda config: f"{config.model_type}-{config.norm_topk_prob}")
def theirs(request, tmp_path):
    """A model of another family with no parameter at its initial value, and its directory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param, experts_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    model.tie_weights()
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    return model, tmp_path


def test_logits_loss_and_every_gradient_are_those_of_transformers(theirs):
    model, directory = theirs
    ours = MoEForCausalLM.from_pretrained(directory)
    result = ours(TOKENS, labels=TOKENS)
    expected = model(TOKENS, labels=TOKENS)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)
    loss = result.loss_sum / result.num_targets
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients = {hf.published_name(name): parameter.grad for name, parameter in model.named_parameters()}
    mine = {hf.published_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    assert mine.keys() == gradients.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-5, msg=lambda told, n=name: n + told)


def test_what_is_written_is_the_same_class_and_the_same_bytes(theirs, tmp_path_factory):
    model, directory = theirs
    ours, back = MoEForCausalLM.from_pretrained(directory), tmp_path_factory.mktemp("back")
    ours.save_pretrained(back)
    again, report = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True, experts_implementation="eager")
    assert type(again) is type(model)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    there = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(there[name], tensor), name
    assert MoEForCausalLM.from_pretrained(back).config == ours.config
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_the_counts_of_parameters_are_those_of_transformers(theirs):
    model, directory = theirs
    assert MoEForCausalLM.from_pretrained(directory).config.num_params() == model.num_parameters()


@pytest.mark.parametrize(
    "change",
    [
        {"clip_qkv": 8.0},
        {"router_temperature": 2.0},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"architectures": ["OlmoeModel"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_that_changes_the_arithmetic_is_refused_by_its_name(change):
    content = OlmoeConfig(**SIZES, intermediate_size=6).to_dict()
    with pytest.raises(UserError, match=next(iter(change))):
        hf.from_transformers_config(json.loads(json.dumps(content | change)))


@pytest.mark.parametrize("change", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"use_sliding_window": True}])
def test_layers_that_qwen_may_have_and_we_have_not_are_refused_by_name(change):
    content = Qwen3MoeConfig(**QWEN, head_dim=8).to_dict()
    with pytest.raises(UserError, match=next(iter(change))):
        hf.from_transformers_config(content | change)

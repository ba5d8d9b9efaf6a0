"""Models that transformers made of other families: read, computed alike, and written as what they were."""

import copy
import json

import pytest
import torch
from support.families import CASES, GLM, MIXTRAL, OLMOE, QWEN
from transformers import AutoModelForCausalLM, Glm4MoeConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.errors import UserError
from moe_llm.families import hf

TOKENS = torch.randint(0, 24, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES, scope="module")
def theirs(request, tmp_path_factory):
    """A model of a family with no parameter and no buffer at its initial value, and its directory."""
    torch.manual_seed(0)
    config, directory = copy.deepcopy(CASES[request.param]), tmp_path_factory.mktemp("theirs")
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            parameter.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    model.tie_weights()
    model.save_pretrained(directory, max_shard_size="3KB")
    return model, directory


def as_gpt_oss_has_it(name, tensor):
    """Gate and up in turn, and matrices of experts transposed."""
    if ".experts.gate_up_proj" in name:
        gate, up = tensor.chunk(2, dim=1)
        tensor = torch.stack([gate, up], 2).flatten(1, 2)
    return tensor.transpose(1, 2) if ".experts." in name and tensor.dim() == 3 else tensor


def test_logits_loss_and_every_gradient_are_those_of_transformers(theirs):
    model, directory = theirs
    ours = MoEForCausalLM.from_pretrained(directory)
    result = ours(TOKENS, labels=TOKENS)
    expected = model(TOKENS, labels=TOKENS)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)
    loss = result.loss_sum / result.num_targets
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    model.zero_grad()
    loss.backward()
    expected.loss.backward()
    gradients = {hf.published_name(name): parameter.grad for name, parameter in model.named_parameters()}
    mine = {hf.published_name(name): parameter.grad for name, parameter in ours.named_parameters()}
    if model.config.model_type == "gpt_oss":
        mine = {name: as_gpt_oss_has_it(name, gradient) for name, gradient in mine.items()}
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
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-6, atol=1e-6)


def test_the_counts_of_parameters_are_those_of_transformers(theirs):
    model, directory = theirs
    assert MoEForCausalLM.from_pretrained(directory).config.num_params() == model.num_parameters()


PLAIN = {
    "mixtral": MixtralConfig(**MIXTRAL),
    "olmoe": OlmoeConfig(**OLMOE),
    "qwen3_moe": Qwen3MoeConfig(**QWEN, head_dim=8),
    "glm4_moe": Glm4MoeConfig(**GLM),
}
CHANGES = [
    ("olmoe", {"clip_qkv": 8.0}),
    ("olmoe", {"router_temperature": 2.0}),
    ("olmoe", {"hidden_act": "gelu"}),
    ("olmoe", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}),
    ("olmoe", {"architectures": ["OlmoeModel"]}),
    ("mixtral", {"attention_scale": 2.0}),
    ("mixtral", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32.0}}),
    ("mixtral", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ("mixtral", {"first_k_dense_replace": 1}),
    ("qwen3_moe", {"layer_types": ["full_attention", "linear_attention"]}),
    ("glm4_moe", {"scoring_func": "softmax"}),
    ("glm4_moe", {"partial_rotary_factor": 0.01}),
]


@pytest.mark.parametrize(("family", "change"), CHANGES, ids=lambda value: next(iter(value)) if value else value)
def test_a_key_that_changes_the_arithmetic_is_refused_by_its_name(family, change):
    content = json.loads(json.dumps(PLAIN[family].to_dict()))
    if "partial_rotary_factor" in change:
        content.pop("rope_parameters")
    with pytest.raises(UserError, match=next(iter(change))):
        hf.from_transformers_config(content | change)


@pytest.mark.parametrize("kind", ["qwen3_next", "llama4", "dbrx", None])
def test_families_that_stay_out_are_refused_with_those_that_are_in(kind):
    with pytest.raises(UserError, match="mixtral, qwen2_moe, qwen3_moe, olmoe, glm4_moe"):
        hf.from_transformers_config({"model_type": kind})

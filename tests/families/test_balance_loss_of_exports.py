"""The modelling code beside a checkpoint's weights has the balance loss of training as its aux_loss, with the same gradient:
other programs switch it on by themselves."""

import pytest
import torch

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import ModelConfig
from moe_llm.families.remote_code.modeling_moe_llm import MoELLMForCausalLM
from moe_llm.model.init import build_model

ROUTERS: dict[str, dict] = {
    "top_p": {},
    "hierarchical": {"groups": 2, "groups_per_token": 1},
    "bias_balanced": {"score": "softmax"},
    "multi_head": {"heads": 2},
    "attention": {},
    "em": {},
    "reinforce": {},
    "balanced": {},
    "expert_choice": {},
    "transformer": {},
    "lory": {"segment_length": 4},
    "soft_moe": {"slots_per_expert": 1, "segment_length": 4},
}
ONE = ("lory", "soft_moe", "hierarchical")  # two of a group of two would have equal loads whatever the gate says
# equal loads, always or by thresholds that no step has moved yet, so that the loss has no gradient
NO_CHOICE = ("soft_moe", "expert_choice")


def models(kind: str, scope: str, directory):
    model = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1 if kind in ONE else 2,
        "max_position_embeddings": 32, "initializer_range": 0.4, "router": {"type": kind, **ROUTERS[kind]},
        "router_aux_loss_coef": 0.25, "router_aux_loss_scope": scope, "router_z_loss_coef": 0.0,
        "num_shared_experts": 1,
    }  # fmt: skip
    made = build_model(ModelConfig.model_validate(model), seed=3)
    ours = MoEForCausalLM(made.config)
    ours.load_state_dict(made.state_dict())
    ours.save_pretrained(directory)
    return ours.eval(), MoELLMForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize(
    ("kind", "scope"), [*((kind, "global") for kind in ROUTERS), ("top_p", "sequence"), ("multi_head", "transformers")]
)
def test_aux_loss_and_its_gradient_are_those_of_training(kind, scope, tmp_path):
    ours, theirs = models(kind, scope, tmp_path)
    ids = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    own = ours(ids, attention_mask=mask)
    found = theirs(input_ids=ids, attention_mask=mask, output_router_logits=True)
    assert found.aux_loss.item() == pytest.approx(own.aux_loss.item(), rel=1e-5)
    own.aux_loss.backward()
    found.aux_loss.backward()
    expected, gradient = ours.model.layers[1].mlp.gate.weight.grad, theirs.model.layers[1].mlp.gate.weight.grad
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert (gradient.abs().max() > 1e-6) == (kind not in NO_CHOICE)


def test_the_loss_has_it_times_its_coefficient_where_it_is_asked_for(tmp_path):
    _, theirs = models("top_p", "global", tmp_path)
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    plain = theirs(input_ids=ids, labels=ids)
    asked = theirs(input_ids=ids, labels=ids, output_router_logits=True)
    assert plain.aux_loss is None
    assert asked.loss.item() == pytest.approx(plain.loss.item() + 0.25 * asked.aux_loss.item(), rel=1e-6)
    assert theirs(input_ids=ids, labels=ids, return_dict=False)[0].item() == pytest.approx(plain.loss.item())
    theirs.config.output_router_logits = True
    assert theirs(input_ids=ids, labels=ids).loss.item() == pytest.approx(asked.loss.item())

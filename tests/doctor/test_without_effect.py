"""Which elements no output depends on, as the doctor sets them aside."""

import pytest
import torch

from moe_llm.config import ModelConfig
from moe_llm.doctor.compare import without_effect
from moe_llm.model.init import build_model

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "initializer_range": 0.3,
}
TOKENS = torch.randint(0, 24, (2, 11), generator=torch.Generator().manual_seed(0))


def test_biases_of_keys_that_are_not_turned_have_no_gradient_and_the_others_have():
    config = ModelConfig(**SIZES, attention_bias="qkv", rope_parameters={"partial_rotary_factor": 0.5})
    model = build_model(config, seed=0)
    model(TOKENS, labels=TOKENS).loss.backward()
    idle = without_effect(config)
    assert len(idle) == 2
    for name, mask in idle.items():
        gradient = model.get_parameter(name).grad.abs()
        assert gradient[torch.from_numpy(mask)].max() < 1e-4 * gradient[torch.from_numpy(~mask)].min()


@pytest.mark.parametrize("more", [{}, {"attention_bias": "all"}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_of_other_models_nothing_is_set_aside(more):
    assert without_effect(ModelConfig(**SIZES, **more)) == {}

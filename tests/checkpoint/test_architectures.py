"""What routers become in transformers: its logits where it has them, this package's own files where it has not."""

import pytest
import torch
from checkpoint_fakes import small_config
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint.architectures import architecture_of, is_mixtral
from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config.routers import ROUTER_SETTINGS
from moe_llm.model.init import init_weights

TOKENS = torch.randint(0, 40, (3, 17), generator=torch.Generator().manual_seed(1))
TOP_K = {"dense": 4, "switch": 1, "top_p": 4}
NATIVE = ["mixtral", "dense", "gshard", "noisy_top_k"]


def model_of(kind: str) -> MoEForCausalLM:
    router = {"type": kind, **({"groups": 2} if kind == "hierarchical" else {})}
    config = small_config(num_local_experts=4, num_experts_per_tok=TOP_K.get(kind, 2), router=router,
                          initializer_range=0.3)
    model = MoEForCausalLM(config)
    init_weights(model, 0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", NATIVE)
def test_transformers_logits_are_ours(tmp_path, kind):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    unused = architecture_of(model.config).unused
    assert {str(key).rpartition(".")[2] for key in report["unexpected_keys"]} == set(unused)
    tokens = TOKENS % model.config.vocab_size
    torch.testing.assert_close(theirs.eval()(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUTER_SETTINGS)
def test_saved_and_loaded_it_is_the_same_model(tmp_path, kind):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    again = MoEForCausalLM.from_pretrained(tmp_path)
    assert again.config.router == model.config.router
    tokens = TOKENS % model.config.vocab_size
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert is_mixtral(model.config) == (kind in NATIVE)
    if kind not in NATIVE:  # refused there, rather than read as another model
        with pytest.raises(ValueError, match="moe_llm"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

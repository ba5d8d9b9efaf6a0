"""A model with one expert is a dense one: it leaves as Mistral, without the router, and comes back."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import FakeState, ThreadRanks, random_tensors, save_arguments, small_config, zeros_like
from transformers import AutoModelForCausalLM, MistralForCausalLM

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.checkpoint.state import load_checkpoint, save_checkpoint
from moe_llm.distributed.state import EMA
from moe_llm.families.architectures import MIXTRAL, architecture_of, export_note
from moe_llm.families.family import SAME
from moe_llm.finetune.upcycle import Recipe, upcycle

DENSE = {"num_local_experts": 1, "num_experts_per_tok": 1}
IDS = torch.randint(0, 24, (2, 11), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def saved(directory, **changes):
    torch.manual_seed(0)
    model = MoEForCausalLM(small_config(**DENSE, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "sliding_window": 4},
        {"router": {"type": "dense"}, "router_aux_loss_coef": 0.5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rms_norm_eps": 1e-3},
    ],
)
def test_one_expert_is_mistral_in_transformers_and_the_same_model_here_again(tmp_path, changes):
    model = saved(tmp_path, **changes)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, MistralForCausalLM)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    again = MoEForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(MoEForCausalLM.from_pretrained(tmp_path / "theirs")), logits(model))


def test_files_of_one_expert_have_no_word_of_experts(tmp_path):
    saved(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if ".mlp." in name or "moe" in name]
    assert {name.split(".mlp.")[1] for name in names} == {f"{x}_proj.weight" for x in ("gate", "up", "down")}
    content = json.loads((tmp_path / "config.json").read_text())
    card = (tmp_path / "README.md").read_text()
    assert "A dense language model" in card
    assert not [word for word in ("mixture", "router", "expert") if word in card]
    del content["moe_llm"]
    assert not [key for key in content if "expert" in key or "router" in key]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_resuming_is_exact_with_the_router_beside_the_model(tmp_path, dtype, average, frozen):
    config = small_config(**DENSE)
    tensors = random_tensors(config, kinds=("exp_avg", "exp_avg_sq", *([EMA] if average else [])))
    ranks = ThreadRanks(1)
    names = {name for name, _ in tensors}
    fixed = {name for name in names if frozen and ".mlp.gate." in name}
    source = FakeState(tensors, 1, 0, ranks, frozen=fixed)
    [(path, error)] = ranks.run(lambda rank: save_checkpoint(tmp_path, source, **save_arguments(config, dtype=dtype)))
    assert error is None
    assert not [name for name in load_file(path / "model.safetensors") if ".mlp.gate." in name]
    state = FakeState(zeros_like(tensors), 1, 0, ranks, frozen=fixed)
    [(_, error)] = ranks.run(lambda rank: load_checkpoint(path, state))
    assert error is None
    for key in [(name, kind) for name in names for kind in ("weight", *([EMA] if average else []))]:
        if key[1] == "weight" or key[0] not in fixed:
            assert torch.equal(state.held[key], tensors[key]), key
    assert isinstance(AutoModelForCausalLM.from_pretrained(path), MistralForCausalLM)


@pytest.mark.parametrize("changes", [{}, {"router": {"type": "dense"}, "sliding_window": 5}])
def test_upcycle_takes_a_dense_baseline(tmp_path, changes):
    model = saved(tmp_path / "dense", **changes)
    upcycle(tmp_path / "dense", tmp_path / "moe", Recipe(4, 2))
    mixture = MoEForCausalLM.from_pretrained(tmp_path / "moe")
    assert (mixture.config.num_local_experts, mixture.config.router.type) == (4, "mixtral")
    torch.testing.assert_close(logits(mixture), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 2},
        {"router": {"type": "noisy_top_k"}},
        {"num_shared_experts": 1, "shared_expert_gate": True},
        {"mlp_only_layers": (0,)},
        {"attention_bias": "qkv"},
    ],
)
def test_what_mistral_does_not_compute_is_none(changes):
    assert architecture_of(small_config(**{**DENSE, **changes})).model_type != "mistral"


def test_the_note_before_training_says_that_the_model_is_dense():
    assert "MistralForCausalLM" in str(export_note(small_config(**DENSE)))
    assert set(architecture_of(small_config(**DENSE)).without) < set(SAME)
    assert architecture_of(small_config()) == MIXTRAL

"""A run with a router that transformers has not: what it says, records and leaves, and what can be done with that."""

import json

import pytest
import torch
from support import runs

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.errors import UserError
from moe_llm.evaluation.evaluate import evaluate_files
from moe_llm.inference.generate import generate
from moe_llm.inspect.inspect import inspect_checkpoint

TOP_P = {"num_experts_per_tok": 4, "router": {"type": "top_p", "p": 0.5, "local_entropy_coef": 0.05}}


def test_a_run_that_transformers_cannot_load(train, corpus, tmp_path, capsys):
    root = train(model={**runs.MODEL, **TOP_P}, evaluate={"max_blocks": 4, "sample_prompt": "abc", "sample_tokens": 5})
    assert "transformers has no architecture with model.router.type=top_p" in capsys.readouterr().err
    last = runs.records(root)[-1]
    entropy = sum(last["moe"]["router_entropy"]) / 2
    assert last["local_entropy_loss"] == pytest.approx(entropy, rel=1e-5)
    assert 1 < min(last["moe"]["experts_per_token"]) < 4
    assert last["loss"] == pytest.approx(
        last["lm_loss"] + 0.01 * last["aux_loss"] + 0.001 * last["z_loss"] + 0.05 * last["local_entropy_loss"], rel=1e-6
    )
    checkpoint = root / "checkpoints/step-00000006"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "moe_llm"
    assert evaluate_files(checkpoint, str(corpus), sequence_length=32)["loss"] == pytest.approx(
        last["val_loss"], rel=0.05
    )

    greedy = generate(checkpoint, "abc", max_new_tokens=6, temperature=0)
    assert greedy.startswith("abc")
    assert greedy == generate(checkpoint, "abc", max_new_tokens=6, temperature=1.0, top_p=1e-9, seed=3)
    assert generate(checkpoint, "abc", max_new_tokens=20, temperature=2.0, seed=1) != generate(
        checkpoint, "abc", max_new_tokens=20, temperature=2.0, seed=2
    )
    with pytest.raises(UserError, match=r"model\.router\.type=top_p"):
        inspect_checkpoint(str(checkpoint), [str(corpus)])


def test_what_depends_on_later_tokens_says_so(train, capsys):
    train(
        model={**runs.MODEL, "router": {"type": "batch_prioritised"}},
        train={"max_steps": 1, "micro_batch_size": 2, "global_batch_size": 4},
    )
    assert "batch_prioritised is not causal in training" in capsys.readouterr().err


def test_the_sequence_loss_is_told_in_deepseeks_normalisation(train, capsys):
    model = {**runs.MODEL, "router_aux_loss_scope": "sequence", "router_aux_loss_coef": 0.005}
    train(model=model, train={"max_steps": 1, "micro_batch_size": 2, "global_batch_size": 4})
    alpha = 0.005 * model["num_experts_per_tok"]
    assert f"this coefficient is alpha={alpha:g} in DeepSeek-V3's equation 17" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "told"), [("mixtral", True), ("switch", False)])
def test_routers_that_the_loss_does_not_reach_are_told(train, capsys, kind, told):
    model = {**runs.MODEL, "num_experts_per_tok": 1, "router": {"type": kind}}
    train(model=model, train={"max_steps": 1, "micro_batch_size": 2, "global_batch_size": 4})
    assert ("the language-model loss does not reach the routers' weight" in capsys.readouterr().err) == told


def test_mixed_experts_have_no_adapters(train, make_config, capsys):
    lory = {"num_experts_per_tok": 1, "router": {"type": "lory", "segment_length": 8}}
    root = train(model={**runs.MODEL, **lory}, evaluate={"max_blocks": 4, "sample_prompt": "abc", "sample_tokens": 5})
    last, base = runs.records(root)[-1], root / "checkpoints/step-00000006"
    assert last["moe"]["experts_per_token"] == pytest.approx([1, 1])
    assert last["moe"]["dropped_share"] == [0, 0]
    lora = {"rank": 2, "targets": ["experts"]}
    config = make_config("lora", model={"init_from": str(base), **lory}, finetune={"lora": lora})
    assert main(["train", str(config)]) == 2
    assert "names experts, and model.router.type=lory mixes their weights" in capsys.readouterr().err


def test_a_run_whose_experts_choose(train, corpus, capsys):
    """Its loads are even, its thresholds move, are saved and resumed, and generation says that it goes by them."""
    model = {**runs.MODEL, "router_aux_loss_coef": 0.0, "router": {"type": "expert_choice"}}
    root = train(model=model, evaluate={"max_blocks": 4})
    told = "each expert whose threshold its probability reaches, perhaps to none"
    assert told in capsys.readouterr().err
    assert all(cv < 0.1 for record in runs.records(root) for cv in record["moe"]["load_cv"])  # but for padding, 0
    checkpoint = root / "checkpoints/step-00000006"
    assert (biases(checkpoint) > 0).all()
    longer = train(
        model=model, evaluate={"max_blocks": 4}, train={"max_steps": 8, "micro_batch_size": 2, "global_batch_size": 4}
    )  # resumes
    assert not torch.equal(biases(longer / "checkpoints/step-00000008"), biases(checkpoint))
    capsys.readouterr()
    assert main(["generate", str(checkpoint), "--prompt", "abc", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().err.count(told) == 1


def test_a_guard_over_another_router_is_refused(make_config, tmp_path, train, capsys):
    base = train("base", train={"max_steps": 1, "micro_batch_size": 2, "global_batch_size": 4})
    config = make_config(
        "next",
        model={"init_from": str(base / "checkpoints/step-00000001"), "router": {"type": "balanced"}},
        finetune={"router_guard": {"action": "log"}},
    )
    assert main(["train", str(config)]) == 2
    assert "model.router.type=balanced does not" in capsys.readouterr().err


def biases(checkpoint) -> torch.Tensor:
    """Of all layers, (L, E)."""
    return torch.stack([bias_E for _, bias_E in MoEForCausalLM.from_pretrained(checkpoint).named_buffers()])


def test_a_run_whose_checkpoints_are_another_architectures(train, corpus, capsys):
    """Without a loss for balance: its bias is saved, resumed, and where another run begins."""
    model = {
        **runs.MODEL,
        "num_shared_experts": 2,
        "router_aux_loss_coef": 0.0,
        "router": {"type": "bias_balanced", "update_rate": 0.001},
    }
    root = train(model=model)
    assert "Glm4MoeForCausalLM" in capsys.readouterr().err
    checkpoint = root / "checkpoints/step-00000006"
    bias_LE = biases(checkpoint)
    steps_LE = (bias_LE / 0.001).round()
    torch.testing.assert_close(bias_LE, 0.001 * steps_LE, rtol=0, atol=1e-7)
    assert 0 < steps_LE.abs().max() <= 6
    last = runs.records(root)[-1]
    assert evaluate_files(checkpoint, str(corpus), sequence_length=32)["loss"] == pytest.approx(
        last["val_loss"], rel=0.05
    )
    assert generate(checkpoint, "abc", max_new_tokens=6, temperature=0).startswith("abc")

    longer = train(model=model, train={"max_steps": 8, "micro_batch_size": 2, "global_batch_size": 4})  # resumes
    found_LE = biases(longer / "checkpoints/step-00000008")
    assert not torch.equal(found_LE, bias_LE)
    assert (found_LE - bias_LE).abs().max().item() <= 0.002 + 1e-6
    again = train(
        "next",
        model={"init_from": str(checkpoint)},
        optim={"lr": 1e-9},
        train={"max_steps": 1, "micro_batch_size": 2, "global_batch_size": 4},
    )
    begun = again / "checkpoints/step-00000001"
    assert MoEForCausalLM.from_pretrained(begun).config.router.update_rate == 0.001
    assert (biases(begun) - bias_LE).abs().max().item() <= 0.001 + 1e-6

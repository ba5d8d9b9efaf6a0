"""Experts in 8 and 4 bits: the layer of the unpacked weights exactly, its gradients too, in a fraction of the bytes; a run
on a packed base trains as one on the unpacked weights, and its export is what it computed with."""

import pytest
import torch
from support import runs
from support.ranks import Ranks
from support.training import MODEL, config, difference, train_steps

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.config import ModelConfig
from moe_llm.ensemble.causal_lm import load_causal_lm
from moe_llm.errors import UserError
from moe_llm.evaluation.evaluate import evaluate_files
from moe_llm.finetune.selection import trained_names
from moe_llm.inference.generate import generate
from moe_llm.model.init import init_weights
from moe_llm.model.quantized import Packed, quantize_experts

pytest.importorskip("bitsandbytes")
IDS = torch.arange(24).view(2, 12)
ERRORS = {"int8": (0.001, 0.03), "nf4": (0.04, 0.13)}  # of normal weights, relative


def model_of(**more) -> MoEForCausalLM:
    model = MoEForCausalLM(ModelConfig(**{**MODEL, "head_dim": 6, **more}))
    init_weights(model, 0)
    return model.eval().requires_grad_(False)


def unpacked(model: MoEForCausalLM, kind: str) -> MoEForCausalLM:
    """A plain model with the weights that packing leaves."""
    plain = MoEForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    for name, parameter in plain.named_parameters():
        if ".experts." in name and not name.endswith("bias"):
            parameter.data = Packed(parameter, kind).detach()
    return plain.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("more", [{}, {"expert_bias": True, "swiglu_limit": 7.0}, {"expert_sizes": [8, 16, 24, 32]}])
def test_a_packed_model_is_that_of_its_unpacked_weights(kind, more):
    model = model_of(**more)
    expected, whole = unpacked(model, kind)(IDS).logits, model(IDS).logits
    told = quantize_experts(model, kind)
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(expected, whole)
    assert not any(".experts." in name and p.dim() == 3 for name, p in model.named_parameters())
    low, high = ERRORS[kind]
    assert low < told["expert_weight_error"] < high
    assert told["expert_bytes"] < told["expert_bytes_before"] * (0.35 if kind == "int8" else 0.25)


@pytest.mark.parametrize("checkpointed", [False, "full"])
def test_gradients_beside_packed_weights_are_those_of_the_unpacked_ones_and_keep_no_copy(checkpointed):
    model, kept = model_of(), []
    plain = unpacked(model, "nf4")
    quantize_experts(model, "nf4")
    for one in (model, plain):
        one.train()
        one.model.recompute = checkpointed
        one.model.embed_tokens.weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    plain(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad)
    assert not any(len(shape) == 3 and shape[0] == MODEL["num_local_experts"] for shape in kept)


def test_transformers_modules_are_packed_too(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path / "mixtral")
    theirs = load_causal_lm(tmp_path / "mixtral")
    quantize_experts(theirs.requires_grad_(False), "int8")
    torch.testing.assert_close(theirs(IDS).logits, unpacked(model, "int8")(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("corpus") / "text.txt")


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
    return runs.trained(text, tmp_path_factory.mktemp("base"), steps=2)


def test_evaluation_says_what_packing_costs_and_generation_takes_it(base, text, capsys):
    losses = {}
    for kind in (None, "int8", "nf4"):
        found = evaluate_files(base, str(text), max_blocks=2, quantize_experts=kind)
        losses[kind] = found["loss"]
        assert ("expert_weight_error" in found) == (kind is not None)
    assert 0 < abs(losses["int8"] - losses[None]) < abs(losses["nf4"] - losses[None]) < 0.05
    arguments = ["evaluate", str(base), "--data", str(text), "--max-blocks", "2", "--quantize-experts", "nf4"]
    assert main(arguments) == 0
    assert "expert_weight_error" in capsys.readouterr().out
    assert generate(base, "the", max_new_tokens=3, temperature=0, quantize_experts="nf4").startswith("the")


def test_adapters_on_a_packed_base_resume_and_export_what_they_computed_with(base, text, tmp_path, capsys):
    def run(name: str, steps: int) -> None:
        raw = runs.sections(
            text, base.parents[2] / "cache", tmp_path / name, train={"max_steps": steps}, logging={"console": "off"}
        )
        raw["model"] = {"init_from": str(base)}
        raw["finetune"] = {"lora": {"rank": 2, "targets": ["experts"]}, "quantize_frozen": "nf4"}
        raw["checkpoint"] = {**raw.get("checkpoint", {}), "every_steps": 1}
        raw["evaluate"] = {"max_blocks": 2}
        assert main(["train", str(runs.write_yaml(tmp_path / f"{name}.yaml", raw))]) == 0, capsys.readouterr().err

    run("straight", 2)
    run("resumed", 1)
    run("resumed", 2)
    models = [
        MoEForCausalLM.from_pretrained(tmp_path / name / "checkpoints/latest") for name in ("straight", "resumed")
    ]
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in models)):
        assert torch.equal(a, b), name
    start = MoEForCausalLM.from_pretrained(base)
    for i, layer in enumerate(models[0].model.layers):
        packed = Packed(start.model.layers[i].mlp.experts.down_proj, "nf4").detach()
        change = layer.mlp.experts.down_proj.detach() - packed
        rank = torch.linalg.matrix_rank(change[0].double(), rtol=1e-4)
        assert rank <= 2, "beneath the adapters lies the packed base"


@pytest.mark.parametrize(
    ("finetune", "parallel", "words"),
    [
        ({"trainable": "experts"}, {}, "trains experts: train other parts, or use lora"),
        ({"trainable": "attention"}, {"zero_stage": 3}, "parallel.zero_stage=3 cuts weights up"),
    ],
)
def test_what_cannot_be_packed_is_refused(finetune, parallel, words):
    with pytest.raises(UserError) as refused:
        trained_names(config(1, 1, 1, model=MODEL, finetune={**finetune, "quantize_frozen": "nf4"}, parallel=parallel))
    assert words in str(refused.value)


def adapted(ranks: int) -> dict:
    lora = {"lora": {"rank": 2, "targets": ["experts"]}, "quantize_frozen": "nf4"}
    return train_steps(config(4 // ranks, 1, ranks, ep=ranks, model={**MODEL, "head_dim": 6}, finetune=lora), 2)


def test_packed_experts_on_two_ranks_equal_those_of_one_process(two_ranks: Ranks):
    expected, found = adapted(1), two_ranks.run(adapted, 2)
    for rank in found:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        worst, where = difference([rank], expected, "weights")
        assert worst < 1e-4, where

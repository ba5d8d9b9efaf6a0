"""Experts of different width or activation: the sum of plain gated units, no padding, the same in transformers and on any
ranks."""

import pytest
import torch
import torch.nn.functional as F
from support.ranks import Ranks
from support.training import MODEL, config, train_steps
from transformers import AutoModelForCausalLM

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import ModelConfig
from moe_llm.config.load import validate
from moe_llm.errors import UserError
from moe_llm.model.init import init_weights
from moe_llm.model.moe.experts import MoELayer
from moe_llm.planner.layout import held_parameters

SIZES = [8, 20, 33, 12]
ACTIVATIONS = ["relu2", "silu", "gelu", "gelu_pytorch_tanh"]
_MODEL = {**MODEL, "head_dim": 6, "expert_sizes": SIZES, "expert_activations": ACTIVATIONS}


def model_of(**more) -> MoEForCausalLM:
    model = MoEForCausalLM(ModelConfig(**{**_MODEL, **more}))
    init_weights(model, 0)
    return model.eval()


@pytest.mark.parametrize("differ", ["width", "activation", "both"])
def test_a_layer_is_the_weighted_sum_of_its_tokens_experts_and_so_are_its_gradients(differ):
    torch.manual_seed(0)
    kept = {"width": {"expert_activations": None}, "activation": {"expert_sizes": None}}.get(differ, {})
    config = ModelConfig(**{**_MODEL, **kept})
    sizes = config.expert_sizes or (config.intermediate_size,) * 4
    functions = [F.silu] * 4
    if config.expert_activations is not None:
        functions = [lambda x: F.relu(x) ** 2, F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")]
    layer = MoELayer(config).double()
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5)
    x_BSD = torch.randn(2, 7, MODEL["hidden_size"], dtype=torch.float64)
    y_BSD, _ = layer(x_BSD, torch.ones(2, 7, dtype=torch.bool))
    share_TE = (x_BSD.flatten(0, 1) @ layer.gate.weight.T).softmax(-1)
    value_TK, expert_TK = share_TE.topk(2)
    expected = []
    for x_D, value_K, expert_K in zip(x_BSD.flatten(0, 1), value_TK / value_TK.sum(-1, keepdim=True), expert_TK):
        outputs = []
        for e in expert_K.tolist():
            own = layer.experts.get_submodule(str(e))
            assert own.gate_up_proj.shape == (1, 2 * sizes[e], MODEL["hidden_size"])
            gate, up = (own.gate_up_proj[0] @ x_D).chunk(2)
            outputs.append(own.down_proj[0] @ (functions[e](gate) * up))
        expected.append(value_K @ torch.stack(outputs))
    torch.testing.assert_close(y_BSD.flatten(0, 1), torch.stack(expected), rtol=1e-6, atol=1e-6)
    names, parameters = zip(*layer.named_parameters())
    ours = torch.autograd.grad(y_BSD.square().sum(), parameters)
    theirs = torch.autograd.grad(torch.stack(expected).square().sum(), parameters)
    for name, a, b in zip(names, ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


@torch.no_grad()
def test_transformers_computes_the_same_and_the_files_come_back(tmp_path):
    model, ids = model_of(), torch.arange(20).view(2, 10)
    model.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, trust_remote_code=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(theirs.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    again = MoEForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_parameters_are_counted_without_padding():
    model, sizes = model_of(), ModelConfig(**_MODEL)
    assert sizes.num_params() == sum(p.numel() for p in model.parameters())
    per_row = 3 * MODEL["hidden_size"] * MODEL["num_hidden_layers"]
    counts = sizes.parameter_counts()
    assert counts["experts"] == per_row * sum(SIZES)
    assert sizes.parameter_counts(active=True)["experts"] == per_row * sum(SIZES) * 2 // 4  # two of the mean width

    class Layout:
        expert_parallel = 2

    run = config(2, 1, 2, ep=2, model=_MODEL)
    assert held_parameters(run, Layout())[1] == per_row * max(8 + 20, 33 + 12)


def run_of(world: int, stage: int = 1, **more):
    return config(6 // world, 1, world, ep=world, stage=stage, model=_MODEL, **more)


def on_ranks(root: str) -> list[dict]:
    adapters = {"finetune": {"lora": {"rank": 2, "targets": ["experts"]}}}
    return [
        train_steps(run_of(2), 3, save=f"{root}/1"),
        train_steps(run_of(2, stage=3), 3, save=f"{root}/3"),
        train_steps(run_of(2, **adapters), 3),
    ]


def test_two_ranks_equal_one_process_and_resume_in_it(two_ranks: Ranks, tmp_path):
    straight = train_steps(run_of(1), 4)
    adapted = train_steps(run_of(1, finetune={"lora": {"rank": 2, "targets": ["experts"]}}), 3)
    found = two_ranks.run(on_ranks, str(tmp_path))
    expected = train_steps(run_of(1), 3)
    for rank, per_rank in enumerate(found):
        for result in per_rank[:2]:
            assert result["losses"] == pytest.approx(straight["losses"][:3], rel=1e-5)
            assert result["norms"] == pytest.approx(straight["norms"][:3], rel=1e-4)
            held = {name for name in result["weights"] if ".experts." in name}
            assert {name.split(".experts.")[1][0] for name in held} == {str(2 * rank), str(2 * rank + 1)}
            for name, (_, tensor) in result["weights"].items():
                torch.testing.assert_close(tensor, expected["weights"][name][1], rtol=1e-4, atol=1e-5, msg=name)
        assert per_rank[2]["losses"] == pytest.approx(adapted["losses"], rel=1e-5)
    for result in found[0][:2]:
        resumed = train_steps(run_of(1), 1, source=result["saved"], first=3)
        assert resumed["losses"] == pytest.approx(straight["losses"][3:], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expert_sizes": [8, 8, 8]}, "expert_sizes=[8, 8, 8] has 3 entries for num_local_experts=4"),
        ({"expert_sizes": [8, 8, 8, 0]}, "expert_sizes.3"),
        ({"expert_activations": ["silu"]}, 'expert_activations=["silu"] has 1 entries for num_local_experts=4'),
        ({"expert_activations": ["silu", "silu", "swish", "relu"]}, "expert_activations.2"),
        ({"swiglu_limit": 7.0, "expert_activations": ACTIVATIONS}, "does not go with swiglu_limit=7"),
        (
            {
                "expert_activations": ACTIVATIONS,
                "expert_sizes": None,
                "router": {"type": "lory"},
                "num_experts_per_tok": 1,
            },
            "are not mixed by model.router.type=lory",
        ),
        ({"router": {"type": "lory"}, "num_experts_per_tok": 1}, "are not mixed by model.router.type=lory"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, words):
    raw = config(2, 1, 1, model=MODEL).model_dump(mode="json")
    with pytest.raises(UserError) as refused:
        validate({**raw, "model": {**raw["model"], **{"expert_sizes": SIZES}, **settings}})
    assert words in str(refused.value)


def test_single_experts_and_moves_are_refused_beside_them():
    from moe_llm.finetune.selection import trained_names
    from moe_llm.train.callbacks.registry import build_callbacks

    with pytest.raises(UserError, match=r"finetune.experts=\[0\] does not go with model.expert_sizes"):
        trained_names(config(2, 1, 1, model=_MODEL, finetune={"trainable": "experts", "experts": [0]}))
    with pytest.raises(UserError, match=r"finetune.experts=\[0\] does not go with model.expert_activations"):
        trained_names(
            config(2, 1, 1, model={**_MODEL, "expert_sizes": None}, finetune={"trainable": "experts", "experts": [0]})
        )
    dynamic = {"expert_parallel_size": 2, "placement": "dynamic"}
    with pytest.raises(UserError, match="moves experts of one shape"):
        build_callbacks(config(2, 1, 2, model=_MODEL, parallel=dynamic))
    with pytest.raises(UserError, match="moves experts of one form"):
        build_callbacks(config(2, 1, 2, model={**_MODEL, "expert_sizes": None}, parallel=dynamic))

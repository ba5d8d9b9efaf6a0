"""What keeps experts in use: DeepSeekMoE's losses by their equations, and a bias that no loss moves; shared experts."""

import pytest
import torch
import torch.nn.functional as F
from support.ranks import fresh_accelerate
from support.training import config, rows

from moe_llm.config import ModelConfig
from moe_llm.data.packing import model_inputs
from moe_llm.distributed.runtime import start
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.model.init import build_model
from moe_llm.model.moe.experts import MoELayer
from moe_llm.model.moe.losses import router_loss_values
from moe_llm.model.moe.router import end_step
from moe_llm.model.moe.routers import router_losses
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.train.build import build_trained

B, S, D, E, K = 3, 8, 12, 6, 2
SIZES = {
    "vocab_size": 40,
    "hidden_size": D,
    "intermediate_size": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "initializer_range": 0.4,
}


def layer_of(**model) -> MoELayer:
    layer = MoELayer(ModelConfig(**SIZES | model))
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return layer


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    mask_BS = torch.ones(B, S, dtype=torch.bool)
    mask_BS[2, 5:] = False
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(2)), mask_BS


@pytest.mark.parametrize("groups", [2, 3])
def test_balance_losses_are_deepseekmoes(groups):
    """Dai et al. 2024, equations 12 to 16, token by token."""
    router = {"type": "deepseek_moe", "expert_balance_coef": 0.2, "device_balance_coef": 0.3, "device_groups": groups}
    layer, (x_BSD, mask_BS) = layer_of(router=router), inputs()
    s_TE = (x_BSD[mask_BS] @ layer.gate.weight.T).softmax(-1)
    f = [
        E / (K * len(s_TE)) * sum(1 for row in s_TE.tolist() if i in sorted(range(E), key=lambda j: -row[j])[:K])
        for i in range(E)
    ]
    p = [s_TE[:, i].sum() / len(s_TE) for i in range(E)]
    members = [range(d * E // groups, (d + 1) * E // groups) for d in range(groups)]
    expected = [
        sum(f[i] * p[i] for i in range(E)),
        sum(sum(f[i] for i in mine) / len(mine) * sum(p[i] for i in mine) for mine in members),
    ]
    losses = router_losses(ModelConfig(**SIZES, router=router))
    named = {"expert_balance_loss": 0.2, "device_balance_loss": 0.3}
    assert {loss.name: loss.coefficient for loss in losses} == named
    found = router_loss_values(losses, RoutingStatistics.stack([layer(x_BSD, mask_BS)[1]]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        slopes = (torch.autograd.grad(v, layer.gate.weight, retain_graph=True)[0] for v in (ours, theirs))
        torch.testing.assert_close(*slopes)


def test_the_bias_moves_against_the_load_of_real_tokens():
    layer, (x_BSD, mask_BS) = layer_of(router={"type": "bias_balanced", "update_rate": 0.25}), inputs()
    counts_E = layer(x_BSD, mask_BS)[1].tokens_per_expert_E
    assert counts_E.sum() == K * mask_BS.sum()
    mean = K * int(mask_BS.sum()) / E
    layer.gate.after_step(layer(x_BSD, mask_BS)[1])
    expected = [0.25 * ((mean > count) - (mean < count)) for count in counts_E.tolist()]
    assert layer.gate.e_score_correction_bias.tolist() == expected
    assert {-0.25, 0.25} <= set(expected)


def test_the_bias_changes_who_is_chosen_and_no_weight():
    layer, (x_BSD, mask_BS) = layer_of(router={"type": "bias_balanced", "norm_topk_prob": False}), inputs()
    layer.gate.e_score_correction_bias[1] = 100.0
    routing = layer.gate(x_BSD, mask_BS)
    assert routing.counts_E[1] == B * S
    first = int(routing.counts_E[0])
    score_T = torch.sigmoid(x_BSD.flatten(0, 1) @ layer.gate.weight[1])
    torch.testing.assert_close(routing.weight_N[first : first + B * S], score_T)


def load_variation(rate: float, aux: float = 0.0, kind: str = "bias_balanced", **settings) -> float:
    """Of the last steps of a run, the mean over layers; routers begin far from balance."""
    fresh_accelerate()
    router = {"type": kind, **({"update_rate": rate} if kind == "bias_balanced" else {}), **settings}
    model = {
        **config(8, 1, 1).model_dump(mode="json")["model"],
        "router": router,
        "router_aux_loss_coef": aux,
        "router_z_loss_coef": 0.0,
        "num_local_experts": 8,
        "initializer_range": 0.2,
    }
    cfg = config(16, 1, 1, optimizer="adamw", model=model)
    runtime = start(cfg)
    engine, _ = build_trained(cfg, runtime, None)
    with torch.no_grad():
        for layer in engine.model.model.layers:
            layer.mlp.gate.weight += 0.5 * torch.linspace(-1, 1, 8)[:, None] * layer.mlp.gate.weight[:1].sign()
    counts = 0
    for step in range(120):
        batch = rows(step, 0, 16)
        step_loss = StepLoss(cfg.model, runtime, [batch])
        engine.backward(step_loss(engine.forward(**model_inputs(batch))).total, last=True)
        engine.step(1e-3)
        end_step(engine.model, step_loss.routing)
        if step >= 90:
            counts = counts + step_loss.routing.tokens_per_expert_E
    return (counts.std(-1, correction=0) / counts.mean(-1)).mean().item()


def test_a_run_without_a_loss_is_balanced_by_the_bias_alone():
    assert load_variation(0.01) < 0.2 < load_variation(0.0)


def test_each_balance_loss_lowers_the_variation():
    without = load_variation(0, kind="deepseek_moe", expert_balance_coef=0.0)
    assert load_variation(0, kind="deepseek_moe", expert_balance_coef=0.5) < 0.8 * without
    assert (
        load_variation(0, kind="deepseek_moe", expert_balance_coef=0.0, device_balance_coef=0.5, device_groups=4)
        < 0.9 * without
    )
    assert load_variation(0.0, aux=0.0) > load_variation(0.0, aux=0.2)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_are_added_to_the_routed_sum(gated):
    layer, (x_BSD, mask_BS) = layer_of(num_shared_experts=2, shared_expert_gate=gated), inputs()
    x_TD, shared = x_BSD.flatten(0, 1), layer.shared_experts
    assert shared.gate_proj.weight.shape == (10, D)
    expected_TD = torch.zeros_like(x_TD)
    for half in (slice(0, 5), slice(5, 10)):  # two experts of width 5
        hidden_TF = F.silu(x_TD @ shared.gate_proj.weight[half].T) * (x_TD @ shared.up_proj.weight[half].T)
        expected_TD += hidden_TF @ shared.down_proj.weight[:, half].T
    if gated:
        expected_TD *= torch.sigmoid(x_TD @ layer.shared_expert_gate.weight.T)
    routed_TD = layer.dispatcher(x_TD, layer.gate(x_BSD, mask_BS), layer.experts)
    torch.testing.assert_close(layer(x_BSD, mask_BS)[0].flatten(0, 1), routed_TD + expected_TD)


def test_shared_experts_have_the_experts_dropout_and_smaller_residual_weights():
    layer, (x_BSD, _) = layer_of(num_shared_experts=1, expert_dropout=0.5), inputs()
    whole = layer.shared_experts.eval()(x_BSD)
    assert not torch.allclose(layer.shared_experts.train()(x_BSD), whole)
    model = build_model(ModelConfig(**SIZES | {"hidden_size": 64, "num_shared_experts": 3, "intermediate_size": 32}), 0)
    shared = model.model.layers[0].mlp.shared_experts
    assert shared.up_proj.weight.std().item() == pytest.approx(0.4, rel=0.05)
    assert shared.down_proj.weight.std().item() == pytest.approx(0.2, rel=0.05)  # divided by sqrt(2 * 2 layers)


@pytest.mark.parametrize("more", [{"num_shared_experts": 2}, {"num_shared_experts": 1, "shared_expert_gate": True}])
def test_shared_experts_are_counted(more):
    cfg = ModelConfig(**SIZES | more)
    model = build_model(cfg, 0)
    assert cfg.num_params() == sum(p.numel() for p in model.parameters())
    shared = sum(p.numel() for name, p in model.named_parameters() if "shared_expert" in name)
    assert cfg.parameter_counts()["shared_experts"] == cfg.parameter_counts(active=True)["shared_experts"] == shared > 0

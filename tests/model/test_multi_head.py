"""Parts of tokens routed apart, against the paper's equations; what is counted and balanced; sizes."""

import pytest
import routing_reference as reference
import torch
import torch.nn.functional as F
from support.training import config, rows

from moe_llm.config import ModelConfig
from moe_llm.data.packing import model_inputs
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.flops import train_flops_per_token
from moe_llm.model.init import build_model, init_weights
from moe_llm.model.moe.experts import MoELayer
from moe_llm.model.moe.losses import balance_loss
from moe_llm.model.moe.routing import RoutingStatistics

B, S, D, E, H, K = 3, 7, 12, 6, 3, 2
T = B * S


def config_of(**more) -> ModelConfig:
    settings = {"type": "multi_head", "heads": H, **more.pop("router", {})}
    return ModelConfig(
        **{
            "vocab_size": 40,
            "hidden_size": D,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_local_experts": E,
            "num_experts_per_tok": K,
            "max_position_embeddings": 64,
            "initializer_range": 0.4,
            "router": settings,
            **more,
        }
    )


def layer_of(model: ModelConfig) -> MoELayer:
    layer, generator = MoELayer(model), torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return layer


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mask_BS = torch.ones(B, S, dtype=torch.bool)
    mask_BS[1, 5:] = False
    return x_BSD, mask_BS


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_topk_prob": True},
        {"capacity_factor": 0.8},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_outputs_and_gradients_are_those_of_the_papers_equations(settings):
    layer, (x_BSD, mask_BS) = layer_of(config_of(router=settings)), inputs()

    def expert(e, x_W):
        gate_FW, up_FW = layer.experts.gate_up_proj[e].chunk(2)
        return layer.experts.down_proj[e] @ (F.silu(gate_FW @ x_W) * (up_FW @ x_W))

    assert layer.experts.gate_up_proj.shape == (E, 16, D // H)
    expected_TD, counts, dropped = reference.multi_head(
        x_BSD.flatten(0, 1),
        dict(layer.gate.named_parameters()),
        mask_BS.tolist(),
        K,
        H,
        settings.get("norm_topk_prob", False),
        expert,
        settings.get("capacity_factor"),
    )
    y_BSD, statistics = layer(x_BSD, mask_BS)
    real_T, leaves = mask_BS.flatten(), {"x": x_BSD, **dict(layer.named_parameters())}
    found_TD = y_BSD.flatten(0, 1)[real_T]
    torch.testing.assert_close(found_TD, expected_TD[real_T], rtol=1e-5, atol=1e-5)
    direction_TD = torch.randn(len(found_TD), D, generator=torch.Generator().manual_seed(3))
    ours, theirs = (
        torch.autograd.grad((y_TD * direction_TD).sum(), leaves.values()) for y_TD in (found_TD, expected_TD[real_T])
    )
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, at=name: f"{at}: {m}")

    assert statistics.tokens_per_expert_E.tolist() == counts
    assert statistics.num_tokens == H * mask_BS.sum()
    assert statistics.dropped == dropped
    assert (dropped > 0) == ("capacity_factor" in settings)
    assert statistics.probability_sum_E.sum().item() == pytest.approx(statistics.num_tokens.item(), rel=1e-5)


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_the_balance_loss_of_undecided_routers_is_k_as_ever(scope):
    layer, (x_BSD, mask_BS) = layer_of(config_of(router_aux_loss_scope=scope)), inputs()
    layer.gate.weight.data.zero_()
    stacked = RoutingStatistics.stack([layer(x_BSD, mask_BS)[1]])
    assert balance_loss(stacked, scope).item() == pytest.approx(K, rel=1e-5)


class Alone:
    world_size = 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_a_step_of_training_sees_the_losses_of_its_batch(scope):
    """Whose tokens are counted beforehand, and whose parts are what is routed."""
    cfg = config(
        4,
        1,
        1,
        model={"router": {"type": "multi_head", "heads": 3, "entropy_bonus_coef": 0.2}, "router_aux_loss_scope": scope},
    )
    model, batch = build_model(cfg.model, 0), rows(0, 0, 4)
    output = model(**model_inputs(batch))
    losses = StepLoss(cfg.model, Alone(), [batch])(output)
    for found, expected in ((losses.aux, output.aux_loss), (losses.z, output.z_loss), (losses.total, output.loss)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_no_logit_depends_on_a_later_token():
    model = MoEDecoder(config_of())
    init_weights(model, 0)
    ids_BS = torch.randint(0, 40, (2, S), generator=torch.Generator().manual_seed(1))
    changed_BS = ids_BS.clone()
    changed_BS[:, 4:] = (changed_BS[:, 4:] + 1) % 40
    before, after = model(ids_BS).logits, model(changed_BS).logits
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_sizes_and_work_are_those_of_parts():
    model = config_of()
    counts, active = model.parameter_counts(), model.parameter_counts(active=True)
    expert = 3 * (D // H) * 8
    assert counts["experts"] == 2 * E * expert == active["experts"]  # K * H of E experts, so all of them
    assert counts["router"] == 2 * (E * D // H + 2 * D * D)
    work = [train_flops_per_token(config_of(num_experts_per_tok=k), 8) for k in (2, 4)]
    assert work[1] - work[0] == 6 * 2 * 2 * H * expert  # rows, of which a token has more than there are experts


def test_the_maps_around_the_experts_keep_a_vectors_length():
    """Glorot's deviation at gains 1 / sqrt(2) and 1, whatever `initializer_range`."""
    sizes = {"hidden_size": 192, "num_attention_heads": 2, "router": {"heads": 3}, "num_hidden_layers": 2}
    for initializer_range in (0.02, 0.4):
        model = build_model(config_of(**sizes, initializer_range=initializer_range), 0)
        x_TD = torch.randn(50, 192, generator=torch.Generator().manual_seed(1))
        for layer in model.model.layers:
            router = layer.mlp.gate
            for projection, gain in ((router.head_proj, 0.5**0.5), (router.merge_proj, 1.0)):
                longer = (projection(x_TD).norm(dim=-1) / x_TD.norm(dim=-1)).mean().item()
                assert longer == pytest.approx(gain, rel=0.05)
            assert router.weight.std().item() == pytest.approx(initializer_range, rel=0.1)

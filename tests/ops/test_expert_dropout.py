"""Dropout within experts: where it acts, how much, and when."""

import pytest
import torch
from support.training import config, train_steps

from moe_llm.config import ModelConfig
from moe_llm.errors import UserError
from moe_llm.model.moe.experts import MoELayer
from moe_llm.ops.expert_mlp import expert_mlp, routed_expert_mlp

E, D, F, N = 3, 8, 8, 4000
COUNTS = torch.tensor([1500, 0, 2500])


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(E, 2 * F, D, generator=generator), torch.eye(F).expand(E, D, F).contiguous()


def test_hidden_activations_are_dropped_and_the_others_scaled():
    """With the identity for down, they are what comes out."""
    gate_up, down = weights()
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    whole = expert_mlp(x, gate_up, down, COUNTS)
    torch.manual_seed(3)
    found = expert_mlp(x, gate_up, down, COUNTS, dropout=0.4)
    kept = found != 0
    assert torch.allclose(found[kept], whole[kept] / 0.6, rtol=1e-5, atol=1e-6)
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.01)
    assert kept.float().mean(0).sub(0.6).abs().max() < 0.05  # every hidden unit alike
    torch.manual_seed(3)
    assert torch.equal(found, expert_mlp(x, gate_up, down, COUNTS, dropout=0.4, backend="loop"))
    torch.manual_seed(4)
    assert not torch.equal(found, expert_mlp(x, gate_up, down, COUNTS, dropout=0.4))


@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_backends_without_it_refuse(backend):
    gate_up, down = weights()
    with pytest.raises(UserError, match=r"has no dropout=0\.4"):
        expert_mlp(torch.zeros(N, D), gate_up, down, COUNTS, dropout=0.4, backend=backend)


def test_tokens_get_the_same_as_their_rows():
    """One expert a token, each once: rows and tokens are the same but for their order."""
    gate_up, down = weights()
    x, order = torch.randn(N, D), torch.randperm(N)
    weight = torch.rand(N)
    torch.manual_seed(5)
    rows = expert_mlp(x[order], gate_up, down, COUNTS, weight_N=weight, dropout=0.3)
    torch.manual_seed(5)
    tokens = routed_expert_mlp(x, gate_up, down, COUNTS, weight, order, order.argsort()[:, None], 0.3)
    assert torch.allclose(tokens[order], rows, atol=1e-6)


def test_a_layer_drops_in_training_alone():
    shape = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 2, "num_local_experts": E}
    layers = [MoELayer(ModelConfig(**shape, expert_dropout=p)) for p in (0.0, 0.5)]
    for p in layers[0].parameters():
        torch.nn.init.normal_(p)
    layers[1].load_state_dict(layers[0].state_dict())
    x, real = torch.randn(2, 5, D), torch.ones(2, 5, dtype=torch.bool)
    plain, dropping = ([layer.train(mode)(x, real)[0] for mode in (True, False)] for layer in layers)
    assert torch.equal(plain[1], dropping[1])
    assert not torch.allclose(plain[0], dropping[0])


def test_it_is_seeded_and_the_same_in_recomputation_also_over_ranks(two_ranks):
    train = {"max_steps": 100, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32", "device": "cpu"}
    model = {"expert_dropout": 0.5, "router_jitter_noise": 0.1}

    def settings(recompute: bool, **changes):
        return config(2, 1, 2, ep=2, model=model | changes, train=train | {"activation_checkpointing": recompute})

    plain, recomputed, without = (
        two_ranks.run(train_steps, given, 2)
        for given in (settings(False), settings(True), settings(False, expert_dropout=0.0))
    )
    for ours, again, other in zip(plain, recomputed, without):
        assert ours["losses"] == again["losses"] != other["losses"]
        for name, (_, gradient) in ours["gradients"].items():
            assert torch.allclose(gradient, again["gradients"][name][1], atol=1e-6), name

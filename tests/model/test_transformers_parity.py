"""Logits, losses and every gradient equal transformers' Mixtral in fp32, on odd shapes."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_llm.config import ModelConfig
from moe_llm.model.decoder import MoEDecoder

BASE = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.02,
    "router_aux_loss_scope": "transformers",
}
SHAPES = {
    "base": {},
    "head_dim": {"head_dim": 20},
    "one_kv_head": {"num_key_value_heads": 1, "num_attention_heads": 6, "hidden_size": 36},
    "all_kv_heads": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 5},
    "rope": {"rope_theta": 1e6, "rms_norm_eps": 1e-3},
    "top1": {"num_experts_per_tok": 1},
    "top_all": {"num_experts_per_tok": 5},
    "dense": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "many_experts": {"num_local_experts": 17, "num_experts_per_tok": 6, "intermediate_size": 10},
}


def pair(**changes) -> tuple[MoEDecoder, MixtralForCausalLM]:
    """The two models with the same random weights; the router's are large, so that its choices are clear."""
    config = ModelConfig(**{**BASE, **changes})
    torch.manual_seed(0)
    theirs = MixtralForCausalLM(
        MixtralConfig(
            **{
                k: getattr(config, k)
                for k in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_local_experts",
                    "num_experts_per_tok",
                    "max_position_embeddings",
                    "tie_word_embeddings",
                    "sliding_window",
                    "rms_norm_eps",
                    "router_aux_loss_coef",
                )
            },
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            output_router_logits=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            use_cache=False,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(30)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(3)
    ours = MoEDecoder(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_logits_losses_and_gradients(shape, padding):
    ours, theirs = pair(**SHAPES[shape])
    ids = torch.randint(0, 67, (3, 19), generator=torch.Generator().manual_seed(1))
    labels, mask = ids.clone(), None
    if padding:
        mask = torch.ones_like(ids)
        rows = {"right": slice(14, None), "left": slice(0, 6)}[padding]
        mask[1, rows], labels[1, rows] = 0, -100
        labels[1, 6] = -100  # with padding on the left it would be predicted from padding, which sees nothing
        labels[2, 3] = -100
    a, b = ours(ids, attention_mask=mask, labels=labels), theirs(ids, attention_mask=mask, labels=labels)

    real = slice(None) if mask is None else mask.bool()
    assert relative(a.logits[real], b.logits[real]) < 1e-5
    assert relative(a.loss, b.loss) < 1e-5
    assert relative(a.aux_loss, b.aux_loss) < 1e-5
    a.loss.backward()
    b.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-5, name
    assert {n for n, _ in ours.named_parameters()} == set(gradients)


def test_aux_loss_per_layer_is_the_mean_of_transformers_own_for_each_layer():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours, theirs = pair(router_aux_loss_scope="global")
    ids = torch.randint(0, 67, (2, 23))
    per_layer = [load_balancing_loss_func((logits,), 5, 2) for logits in theirs(ids).router_logits]
    torch.testing.assert_close(ours(ids).aux_loss, torch.stack(per_layer).mean(), rtol=1e-6, atol=0)


def test_balanced_routing_gives_k_and_collapse_gives_more():
    ours, _ = pair(router_aux_loss_scope="global")
    ids = torch.randint(0, 67, (2, 32))
    with torch.no_grad():
        for layer in ours.model.layers:
            layer.mlp.gate.weight.zero_()
    torch.testing.assert_close(ours(ids).aux_loss, torch.tensor(2.0))


def test_loss_is_the_same_without_logits():
    ours, _ = pair()
    ids = torch.randint(0, 67, (2, 32))
    whole, frugal = ours(ids, labels=ids), ours(ids, labels=ids, return_logits=False)
    assert frugal.logits is None
    assert torch.equal(whole.loss, frugal.loss)
    assert whole.num_targets == 2 * 31

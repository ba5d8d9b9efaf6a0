"""The balance loss is one number with one gradient, however a batch is split; its scopes are what they say."""

from itertools import pairwise

import pytest
import torch

from moe_llm.config import ModelConfig
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import build_model
from moe_llm.model.moe.losses import balance_loss, z_loss
from moe_llm.model.moe.routing import RoutingStatistics

ROWS, LENGTH = 6, 12


def model_of(scope: str, **changes) -> MoEDecoder:
    return build_model(
        ModelConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            initializer_range=0.4,
            router_aux_loss_scope=scope,
            **changes,
        ),
        0,
    )


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[1, 5:] = False
    mask[4] = False
    return {"input_ids": torch.randint(0, 50, (ROWS, LENGTH), generator=generator), "attention_mask": mask}


def rows(part: slice) -> dict[str, torch.Tensor]:
    return {name: value[part] for name, value in batch().items()}


def gradient(model: MoEDecoder) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def detached(statistics: RoutingStatistics) -> RoutingStatistics:
    return RoutingStatistics(*(part.detach() for part in statistics))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cuts", [[6], [3, 3], [1, 2, 3], [1] * 6, [4, 2]])
@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_the_summands_of_any_split_add_up_to_the_whole(scope, cuts, recompute):
    """Row 4 is all padding, so that one of the parts has no token at all."""
    model = model_of(scope)
    whole = model(**batch())
    (whole.aux_loss + whole.z_loss).backward()
    expected = gradient(model)

    model.model.recompute = recompute
    edges = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    outputs = [model(**rows(slice(a, b))) for a, b in pairwise(edges)]
    total = None
    for output in outputs:
        total = detached(output.routing).plus(total)
    aux = sum(balance_loss(output.routing, scope, total=total) for output in outputs)
    z = sum(z_loss(output.routing, total=total) for output in outputs)
    torch.testing.assert_close(aux, whole.aux_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(z, whole.z_loss, rtol=1e-6, atol=0)
    (aux + z).backward()
    for found, wanted in zip(gradient(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scope", ["global", "sequence", "transformers"])
def test_more_padding_changes_nothing(scope):
    model = model_of(scope)
    plain = batch()
    wider = {
        "input_ids": torch.cat([plain["input_ids"], torch.full((ROWS, 5), 7)], 1),
        "attention_mask": torch.cat([plain["attention_mask"], torch.zeros(ROWS, 5, dtype=torch.bool)], 1),
    }
    torch.testing.assert_close(model(**wider).aux_loss, model(**plain).aux_loss, rtol=1e-6, atol=0)


def test_sequence_scope_is_the_mean_of_each_sequences_own_loss():
    model, alone = model_of("sequence"), model_of("global")
    each = [alone(**rows(slice(i, i + 1))).aux_loss for i in range(ROWS) if i != 4]
    torch.testing.assert_close(model(**batch()).aux_loss, torch.stack(each).mean(), rtol=1e-6, atol=0)


def test_sequence_scope_is_top_k_times_deepseek_v3s_loss():
    """DeepSeek-AI 2024, equations 17 to 20, token by token: 1 when balanced, and alpha is the coefficient times K."""
    model, plain = model_of("sequence"), batch()
    logits: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, routing: logits.append(routing.logits_TE))
    found, losses = model(**plain).aux_loss, []
    for layer_TE in logits:
        for row_SE, real_S in zip(layer_TE.softmax(-1).unflatten(0, (ROWS, LENGTH)), plain["attention_mask"]):
            if not real_S.any():
                continue
            share_tE = row_SE[real_S]
            chosen = [set(token.argsort(descending=True)[:2].tolist()) for token in share_tE]
            f = [4 / (2 * len(chosen)) * sum(e in token for token in chosen) for e in range(4)]
            losses.append(sum(f[e] * share_tE[:, e].mean() for e in range(4)))
    torch.testing.assert_close(found / 2, torch.stack(losses).mean(), rtol=1e-5, atol=0)


def test_scopes_differ():
    values = [model_of(scope)(**batch()).aux_loss.item() for scope in ("global", "sequence", "transformers")]
    assert len({round(v, 5) for v in values}) == 3
    assert min(values) > 1.99  # K, at balance


@pytest.mark.parametrize("scope", ["global", "sequence", "transformers"])
def test_following_the_gradient_balances_the_load(scope):
    model = model_of(scope)
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate.weight[0] += 0.4 * layer.mlp.gate.weight[0].sign()
    data = batch()
    optimizer = torch.optim.Adam([layer.mlp.gate.weight for layer in model.model.layers], lr=0.02)

    def variation() -> float:
        counts = model(**data).routing.tokens_per_expert_E
        return (counts.std(-1, correction=0) / counts.mean(-1)).mean().item()

    before = variation()
    for _ in range(60):
        model(**data).aux_loss.backward()
        optimizer.step()
        model.zero_grad()
    assert variation() < 0.6 * before

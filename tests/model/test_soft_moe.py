"""Soft slots against the paper's equations, in segments: outputs, gradients, documents, padding, causality."""

import pytest
import routing_reference as reference
import torch
import torch.nn.functional as F

from moe_llm.config import ModelConfig
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.flops import train_flops_per_token
from moe_llm.model.init import init_weights
from moe_llm.model.moe.experts import MoELayer
from moe_llm.model.moe.losses import balance_loss, z_loss
from moe_llm.model.moe.routing import RoutingStatistics

B, S, D, E, L, SLOTS = 3, 17, 12, 6, 4, 2
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 12, [0] * 17, [3] * 3 + [4] * 4 + [5] * 9 + [-1]])


def config_of(normalize: bool = True, **more) -> ModelConfig:
    router = {"type": "soft_moe", "slots_per_expert": SLOTS, "segment_length": L, "normalize": normalize}
    return ModelConfig(
        **{
            "vocab_size": 40,
            "hidden_size": D,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_local_experts": E,
            "num_experts_per_tok": E * SLOTS // L,
            "max_position_embeddings": 64,
            "initializer_range": 0.4,
            "router": router,
            **more,
        }
    )


def layer_of(config: ModelConfig) -> MoELayer:
    layer, generator = MoELayer(config), torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    if config.router.normalize:
        layer.gate.scale.data.fill_(3.0)
    return layer


def inputs(padded: str) -> tuple[torch.Tensor, torch.Tensor]:
    x_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mask_BS = torch.ones(B, S, dtype=torch.bool)
    if padded == "right":
        mask_BS[0, 13:], mask_BS[2, 16] = False, False
    elif padded == "holes":
        mask_BS[:, 2], mask_BS[0, 9:12], mask_BS[2, 15:] = False, False, False
    elif padded == "left":
        mask_BS[0, :3], mask_BS[1, :13] = False, False
    return x_BSD, mask_BS


def expert_of(layer: MoELayer):
    def expert(e, x_D):
        gate_FD, up_FD = layer.experts.gate_up_proj[e].chunk(2)
        return layer.experts.down_proj[e] @ (F.silu(gate_FD @ x_D) * (up_FD @ x_D))

    return expert


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("padded", "documents"),
    [("no", False), ("right", False), ("left", False), ("right", True), ("holes", False), ("holes", True)],
)
def test_outputs_and_gradients_are_those_of_the_papers_equations(normalize, padded, documents):
    layer, (x_BSD, mask_BS) = layer_of(config_of(normalize)), inputs(padded)
    document_BS = DOCUMENTS if documents else None
    owners = (DOCUMENTS if documents else torch.zeros_like(DOCUMENTS)).tolist()
    expected_BSD = reference.soft_moe(
        x_BSD, dict(layer.gate.named_parameters()), mask_BS.tolist(), owners, L, SLOTS, normalize, expert_of(layer)
    )
    y_BSD, statistics = layer(x_BSD, mask_BS, document_BS)
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=1e-5, atol=1e-5)
    assert expected_BSD.any(-1).sum() >= 12
    direction_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(3))
    leaves = {"x": x_BSD, **dict(layer.named_parameters())}
    ours, theirs = (torch.autograd.grad((y * direction_BSD).sum(), leaves.values()) for y in (y_BSD, expected_BSD))
    for name, found, wanted in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, at=name: f"{at}: {m}")

    segments = sum(
        (sum(real and owner == document for real, owner in zip(mask, row)) - 1) // L
        for mask, row in zip(mask_BS.tolist(), owners)
        for document in set(row)
        if document >= 0
    )
    assert statistics.tokens_per_expert_E.tolist() == [SLOTS * segments] * E
    assert statistics.num_tokens == mask_BS.sum()
    assert statistics.dropped == 0
    assert statistics.probability_sum_E.sum().item() == pytest.approx(mask_BS.sum().item(), rel=1e-5)


def test_statistics_are_those_of_what_tokens_take_of_each_expert():
    """Balanced by construction: the loss for balance is the rows that a token costs, and has no gradient."""
    layer, (x_BSD, mask_BS) = layer_of(config_of(False)), inputs("right")
    logits_TP = x_BSD.flatten(0, 1)[mask_BS.flatten()] @ layer.gate.weight.T
    takes_TE = logits_TP.softmax(-1).unflatten(-1, (E, SLOTS)).sum(-1)
    stacked = RoutingStatistics.stack([layer(x_BSD, mask_BS)[1]])
    torch.testing.assert_close(stacked.probability_sum_E[0], takes_TE.sum(0))
    torch.testing.assert_close(stacked.entropy_sum[0], torch.special.entr(takes_TE).sum())
    torch.testing.assert_close(z_loss(stacked), logits_TP.logsumexp(-1).square().mean())
    aux = balance_loss(stacked, "global")
    assert aux.item() == pytest.approx(stacked.tokens_per_expert_E.sum().item() / mask_BS.sum().item(), rel=1e-5)
    assert torch.autograd.grad(aux, layer.gate.weight, retain_graph=True)[0].abs().max() < 1e-6
    per_sequence = layer_of(config_of(False, router_aux_loss_scope="sequence"))
    stacked = RoutingStatistics.stack([per_sequence(x_BSD, mask_BS)[1]])
    rows = [((n - 1) // L * SLOTS * E) / n for n in mask_BS.sum(1).tolist()]
    assert balance_loss(stacked, "sequence").item() == pytest.approx(sum(rows) / B, rel=1e-5)


def test_the_work_of_mixing_is_counted():
    parameters = config_of().parameter_counts()
    slots, layers = E * SLOTS, 2
    per_segment = layers * (L * slots * D + slots * 3 * D * 8 + 2 * slots * L * D)  # phi, experts, into slots and out
    attention = 4 * layers * D * 16 / 2
    expected = 6 * (parameters["attention"] + parameters["lm_head"] + per_segment / L) + 3 * attention
    found = train_flops_per_token(config_of(normalize=False), 16)
    assert found == pytest.approx(expected)


def test_a_sequence_shorter_than_a_segment_has_no_output_of_experts():
    layer, (x_BSD, mask_BS) = layer_of(config_of()), inputs("no")
    y_BSD, statistics = layer(x_BSD[:, :L], mask_BS[:, :L])
    assert not y_BSD.any()
    assert not statistics.tokens_per_expert_E.any()
    y_BSD.sum().backward()
    assert not layer.experts.down_proj.grad.any()


def test_no_logit_depends_on_a_later_token_and_some_on_earlier_segments():
    model = MoEDecoder(config_of())
    init_weights(model, 0)
    for layer in model.model.layers:  # slots alone carry what is told from one position to the next
        layer.self_attn.o_proj.weight.data.zero_()
    ids_BS = torch.randint(0, 40, (2, S), generator=torch.Generator().manual_seed(1))
    before = model(ids_BS).logits
    for place in range(S):
        changed_BS = ids_BS.clone()
        changed_BS[:, place] = (changed_BS[:, place] + 1) % 40
        differs_S = (model(changed_BS).logits - before).abs().amax((0, 2)) > 1e-6
        assert not differs_S[:place].any()
        assert differs_S[place]
        following = [s for s in range(place + 1, S) if s // L > place // L]
        own = [s for s in range(place + 1, S) if s // L == place // L]
        assert not differs_S[own].any()
        assert differs_S[following].any() == bool(following)


def test_a_document_says_the_same_alone_and_among_others():
    model = MoEDecoder(config_of())
    init_weights(model, 0)
    ids_BS = torch.randint(0, 40, (B, S), generator=torch.Generator().manual_seed(1))
    position_BS = torch.zeros_like(ids_BS)
    for b in range(B):
        for document in DOCUMENTS[b].unique():
            mine_S = DOCUMENTS[b] == document
            position_BS[b, mine_S] = torch.arange(mine_S.sum())
    mask_BS = DOCUMENTS >= 0
    packed = model(ids_BS, mask_BS, document_ids=DOCUMENTS, position_ids=position_BS).logits
    for b in range(B):
        for document in DOCUMENTS[b][mask_BS[b]].unique():
            mine_S = DOCUMENTS[b] == document
            alone = model(ids_BS[b, mine_S][None]).logits[0]
            torch.testing.assert_close(packed[b, mine_S], alone, rtol=1e-5, atol=1e-5)

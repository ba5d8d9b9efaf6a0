"""What a token gets depends on no padding, on nothing else in its block, and, where a router is declared causal, on no
later token, in training as in evaluation."""

import pytest
import torch
from test_routers import B, S, config_of

from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import init_weights
from moe_llm.model.moe.losses import router_loss_values
from moe_llm.model.moe.routers import ROUTERS

# router, num_experts_per_tok, settings: nothing is drawn, and room is short where it can be
CASES = {
    "mixtral": (2, {}),
    "mixtral, drop": (2, {"capacity_factor": 0.7}),
    "mixtral, next": (2, {"capacity_factor": 0.7, "overflow": "next"}),
    "mixtral, residual": (2, {"capacity_factor": 0.7, "overflow": "residual"}),
    "mixtral, queue": (2, {"capacity_factor": 0.5, "overflow": "queue", "queue_depth": 0.3}),
    "mixtral, choice": (2, {"capacity_factor": 0.7, "capacity_order": "choice"}),
    "dense": (6, {}),
    "noisy_top_k": (2, {"noise": False, "capacity_factor": 0.7}),
    "gshard": (2, {"second_expert": "always", "capacity_factor": 0.8}),
    "switch": (1, {"capacity_factor": 0.7}),
    "switch, next": (1, {"capacity_factor": 0.7, "overflow": "next"}),
    "batch_prioritised": (2, {"noise": False, "capacity_factor": 0.6}),
    "top_p": (6, {"p": 0.6}),
    "hierarchical": (2, {"groups": 2}),
    "balanced": (2, {}),
    "deepseek_moe": (3, {"capacity_factor": 0.7}),
    "bias_balanced": (2, {}),
    "soft_moe": (3, {"slots_per_expert": 2, "segment_length": 4}),
    "multi_head": (2, {"heads": 3, "capacity_factor": 0.7}),
    "lory": (1, {"segment_length": 4}),
    "expert_choice": (2, {}),
    "attention": (2, {"heads": 3, "key_size": 4, "capacity_factor": 0.8}),
    "transformer": (2, {"width": 8, "heads": 2}),
    "transformer, window": (2, {"width": 8, "heads": 2, "window": 3, "capacity_factor": 0.8, "overflow": "next"}),
    "reinforce": (2, {"sample": False}),
    "em": (2, {}),
}


def model_of(case: str, training: bool = True) -> MoEDecoder:
    top_k, settings = CASES[case]
    model = MoEDecoder(config_of(case.partition(",")[0], top_k, settings)).train(training)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(7)
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.any():
            tensor.data.normal_(0, 0.3, generator=generator)
    return model


def tokens(rows: int = B, length: int = S) -> torch.Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def test_every_router_has_a_case():
    assert {case.partition(",")[0] for case in CASES} == set(ROUTERS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case, side, training):
    model, ids_BS = model_of(case, training), tokens()
    plain = model(ids_BS)
    filler_BP, real_BS = torch.full((B, 3 * S), 5), torch.ones(B, S, dtype=torch.bool)
    parts, masks = [ids_BS, filler_BP], [real_BS, torch.zeros(B, 3 * S, dtype=torch.bool)]
    place_BS = torch.arange(S).expand(B, -1)
    places = [place_BS, torch.zeros_like(filler_BP)]
    if side == "left":
        parts, masks, places = parts[::-1], masks[::-1], places[::-1]
    wide = model(torch.cat(parts, 1), attention_mask=torch.cat(masks, 1), position_ids=torch.cat(places, 1))
    kept_BSV = wide.logits[:, -S:] if side == "left" else wide.logits[:, :S]
    torch.testing.assert_close(kept_BSV, plain.logits, rtol=1e-5, atol=1e-5)
    for name in ("tokens_per_expert_E", "probability_sum_E", "dropped", "z_sum", "num_tokens"):
        ours, theirs = getattr(wide.routing, name), getattr(plain.routing, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_padding_alone_has_finite_losses_and_gradients(case, tiles):
    """As a rank's whole micro-batch may be; each loss that a router may have is asked for."""
    top_k, settings = CASES[case]
    entropies = {"entropy_bonus_coef": 0.1, "global_entropy_coef": 0.1}
    if case == "top_p":
        entropies = {"local_entropy_coef": 0.1, "global_entropy_coef": 0.1}
    model = MoEDecoder(config_of(case.partition(",")[0], top_k, {**settings, **entropies}, router_z_loss_coef=0.1))
    init_weights(model, 0)
    model.save_memory(False, tiles=tiles)
    ids_BS, nothing_BS = tokens(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    found = model(ids_BS, attention_mask=nothing_BS, targets=torch.full_like(ids_BS, -100))
    loss = found.loss_sum + found.aux_loss + found.z_loss + router_loss_values(model.router_losses, found.routing).sum()
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_document_is_treated_the_same_alone_and_packed(case, training):
    lengths = (9, 4, 13)
    model, ids_1S = model_of(case, training), tokens(1, sum(lengths))
    number_1S = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    place_1S = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids_1S, document_ids=number_1S, position_ids=place_1S)
    alone = [model(part) for part in ids_1S.split(lengths, 1)]
    torch.testing.assert_close(packed.logits, torch.cat([a.logits for a in alone], 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.routing.dropped, sum(a.routing.dropped for a in alone))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_is_declared_causal_is_causal(case, training):
    """And what is not, is not: the warning is worth its line."""
    model, ids_BS = model_of(case, training), tokens(4, 24)
    before = model(ids_BS).logits
    changed = 0.0
    for cut in (8, 16, 20):
        other_BS = ids_BS.clone()
        other_BS[:, cut:] = (other_BS[:, cut:] + 7) % 40
        after = model(other_BS).logits
        assert not torch.equal(after[:, -1], before[:, -1])
        changed = max(changed, (after[:, :cut] - before[:, :cut]).abs().max().item())
    causal = model.config.router.causal or not training
    assert (changed < 1e-5) == causal, changed

"""Every router against its paper's equations: outputs, gradients, statistics and losses of a layer in training."""

import pytest
import routing_reference as reference
import torch
import torch.nn.functional as F

from moe_llm.config import ModelConfig
from moe_llm.config.routers import ROUTER_SETTINGS
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.flops import train_flops_per_token
from moe_llm.model.init import init_weights
from moe_llm.model.moe.capacity import Groups
from moe_llm.model.moe.experts import MoELayer
from moe_llm.model.moe.losses import router_loss_values
from moe_llm.model.moe.router import Router
from moe_llm.model.moe.routers import ROUTERS, router_losses
from moe_llm.model.moe.routing import RoutingStatistics

B, S, D, E = 3, 10, 12, 6
T = B * S
# router, num_experts_per_tok, settings, what the reference is told
CASES = {
    "mixtral": ("mixtral", 2, {}, {}),
    "dense": ("dense", E, {}, {}),
    "noisy_top_k": ("noisy_top_k", 2, {}, {"draws": "normal"}),
    "noisy_top_k, no noise": ("noisy_top_k", 3, {"noise": False}, {}),
    "gshard": ("gshard", 2, {"capacity_factor": 0.8}, {"draws": "uniform", "factor": 0.8}),
    "gshard, always": ("gshard", 2, {"capacity_factor": 1.0, "second_expert": "always"}, {"factor": 1.0}),
    "switch": ("switch", 1, {"capacity_factor": 1.0}, {"factor": 1.0}),
    "batch_prioritised": (
        "batch_prioritised",
        2,
        {"capacity_factor": 0.6},
        {"draws": "normal", "factor": 0.6, "score": "max"},
    ),
    "batch_prioritised, sum": (
        "batch_prioritised",
        2,
        {"capacity_factor": 0.5, "score": "sum", "noise": False},
        {"factor": 0.5, "score": "sum"},
    ),
    "top_p": ("top_p", E, {"p": 0.6}, {"threshold": 0.6}),
    "top_p, at most 2": ("top_p", 2, {"p": 0.9}, {"threshold": 0.9}),
    "hierarchical": ("hierarchical", 2, {"groups": 3, "groups_per_token": 2}, {"groups": 3, "groups_per_token": 2}),
    "hierarchical, 1 group": ("hierarchical", 2, {"groups": 2}, {"groups": 2, "groups_per_token": 1}),
    "balanced": ("balanced", 2, {}, {}),
    "deepseek_moe": ("deepseek_moe", 3, {"routed_scaling_factor": 1.5}, {"scale": 1.5, "share": False}),
    "deepseek_moe, shares": ("deepseek_moe", 3, {"norm_topk_prob": True}, {"scale": 1.0, "share": True}),
    "expert_choice": ("expert_choice", 2, {}, {"factor": 1.0}),
    "expert_choice, fewer": ("expert_choice", 2, {"capacity_factor": 0.6}, {"factor": 0.6}),
    "bias_balanced": ("bias_balanced", 2, {"routed_scaling_factor": 2.5}, {"scale": 2.5, "share": True}),
    "bias_balanced, groups": (
        "bias_balanced",
        3,
        {"n_group": 3, "topk_group": 2, "score": "softmax", "norm_topk_prob": False},
        {"scale": 1.0, "share": False, "groups": 3, "groups_per_token": 2, "score": "softmax"},
    ),
    "attention": ("attention", 2, {"heads": 3, "key_size": 5}, {"heads": 3}),
    "attention, sharp": (
        "attention",
        3,
        {"heads": 1, "key_size": 4, "temperature": 0.5},
        {"heads": 1, "temperature": 0.5},
    ),
    "transformer": ("transformer", 2, {"width": 8, "heads": 2}, {"heads": 2}),
    "transformer, window": ("transformer", 3, {"width": 6, "heads": 1, "window": 3}, {"heads": 1, "window": 3}),
    "reinforce": ("reinforce", 2, {}, {"draws": "gumbel"}),
    "reinforce, likeliest": ("reinforce", 3, {"sample": False, "baseline": "leave_one_out"}, {}),
    "em": ("em", 2, {}, {}),
    "em, all": ("em", E, {"form": "hard"}, {}),
    # these put something else in the tokens' place: files of their own have their references
    "soft_moe": ("soft_moe", 3, {"slots_per_expert": 2, "segment_length": 4}, None),
    "multi_head": ("multi_head", 2, {"heads": 3}, None),
    "lory": ("lory", 1, {"segment_length": 4}, {"length": 4, "merged": True}),
    "lory, one token": ("lory", 1, {"segment_length": 1}, {"length": 1, "merged": True}),
}
SINGLE = {
    "mixtral, 1": ("mixtral", 1, {}),
    "noisy_top_k, 1": ("noisy_top_k", 1, {}),
    "balanced, 1": ("balanced", 1, {}),
    "top_p, 1": ("top_p", 1, {}),
    "batch_prioritised, 1": ("batch_prioritised", 1, {}),
    "deepseek_moe, 1": ("deepseek_moe", 1, {}),
    "deepseek_moe, shares, 1": ("deepseek_moe", 1, {"norm_topk_prob": True}),
    "bias_balanced, 1": ("bias_balanced", 1, {}),
    "bias_balanced, no shares, 1": ("bias_balanced", 1, {"norm_topk_prob": False}),
    "multi_head, 1": ("multi_head", 1, {"heads": 3}),
    "multi_head, shares, 1": ("multi_head", 1, {"heads": 3, "norm_topk_prob": True}),
    "hierarchical, 1 of each": ("hierarchical", 2, {"groups": 3, "groups_per_token": 2}),
    "hierarchical, 1 of 1": ("hierarchical", 1, {"groups": 2}),
}
OF_TOKENS = [case for case, (*_, told) in CASES.items() if told is not None]


def config_of(kind: str, top_k: int, settings: dict, **more) -> ModelConfig:
    return ModelConfig(
        **{
            "vocab_size": 40,
            "hidden_size": D,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_local_experts": E,
            "num_experts_per_tok": top_k,
            "max_position_embeddings": 64,
            "initializer_range": 0.4,
            "router": {"type": kind, **settings},
            **more,
        }
    )


def layer_of(config: ModelConfig) -> MoELayer:
    layer = MoELayer(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    for buffer in layer.buffers():
        buffer.normal_(0, 0.3, generator=generator)
    return layer


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2))
    mask_BS = torch.ones(B, S, dtype=torch.bool)
    mask_BS[1, 7:] = False
    return x_BSD.requires_grad_(), mask_BS


@pytest.mark.parametrize("case", [*CASES, *SINGLE])
def test_what_the_language_model_loss_cannot_move_is_told(case):
    """Router parameters without a gradient are those of `unweighed`: all others have one."""
    kind, top_k, settings, *_ = (CASES | SINGLE)[case]
    config = config_of(kind, top_k, settings)
    layer, (x_BSD, mask_BS) = layer_of(config), inputs()
    torch.manual_seed(9)
    y_BSD, _ = layer(x_BSD, mask_BS)
    direction_BSD = torch.randn(y_BSD.shape, generator=torch.Generator().manual_seed(3))
    names, parameters = zip(*layer.gate.named_parameters(), strict=True)
    slopes = torch.autograd.grad((y_BSD * direction_BSD)[mask_BS].sum(), parameters, allow_unused=True)
    still = [name for name, slope in zip(names, slopes, strict=True) if slope is None or slope.abs().max() < 1e-5]
    if settings.get("noise") is False and "noise_weight" in still:
        still.remove("noise_weight")  # of which nothing is drawn
    assert sorted(still) == sorted(config.router.unweighed(config))


def draws(kind: str | None) -> dict[str, torch.Tensor | None]:
    """The numbers that the router draws first, from the same seed."""
    torch.manual_seed(9)
    if kind == "normal":
        return {"noise_TE": torch.randn(T, E)}
    if kind == "gumbel":
        return {"noise_TE": -(-torch.rand(T, E).log()).log()}
    return {"noise_TE": torch.zeros(T, E), "drawn_T": torch.rand(T) if kind == "uniform" else None}


def by_definition(x_TD: torch.Tensor, layer: MoELayer, gates_TE: torch.Tensor) -> torch.Tensor:
    """y = sum over all experts of gate * expert(x), nothing left out."""
    gate_EFD, up_EFD = layer.experts.gate_up_proj.chunk(2, dim=1)
    hidden_TEF = F.silu(torch.einsum("td,efd->tef", x_TD, gate_EFD)) * torch.einsum("td,efd->tef", x_TD, up_EFD)
    return torch.einsum("te,tef,edf->td", gates_TE, hidden_TEF, layer.experts.down_proj)


def merged_by_definition(x_TD: torch.Tensor, layer: MoELayer, gates_TE: torch.Tensor) -> torch.Tensor:
    """One expert for each token, of weights sum over all experts of gate * weight."""
    gate_TFD, up_TFD = torch.einsum("te,efd->tfd", gates_TE, layer.experts.gate_up_proj).chunk(2, dim=1)
    hidden_TF = F.silu(torch.einsum("td,tfd->tf", x_TD, gate_TFD)) * torch.einsum("td,tfd->tf", x_TD, up_TFD)
    return torch.einsum("tf,te,edf->td", hidden_TF, gates_TE, layer.experts.down_proj)


@pytest.mark.parametrize("case", OF_TOKENS)
def test_outputs_and_gradients_are_those_of_the_papers_equations(case):
    kind, top_k, settings, told = CASES[case]
    layer, (x_BSD, mask_BS) = layer_of(config_of(kind, top_k, settings)), inputs()
    parameters = dict(layer.gate.named_parameters()) | dict(layer.gate.named_buffers())
    gates_TE, dropped = getattr(reference, kind)(
        x_BSD.flatten(0, 1), parameters, mask_BS.tolist(), top_k=top_k, **{**draws(told.get("draws")), **told}
    )
    merged = told.get("merged", False)
    expected_TD = (merged_by_definition if merged else by_definition)(x_BSD.flatten(0, 1), layer, gates_TE)
    direction_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(3))
    leaves = [x_BSD, *layer.parameters()]
    slopes = torch.autograd.grad((expected_TD * direction_TD)[mask_BS.flatten()].sum(), leaves, allow_unused=True)

    torch.manual_seed(9)
    y_BSD, statistics = layer(x_BSD, mask_BS)
    real_T = mask_BS.flatten()
    torch.testing.assert_close(y_BSD.flatten(0, 1)[real_T], expected_TD[real_T], rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((y_BSD.flatten(0, 1) * direction_TD)[real_T].sum(), leaves, allow_unused=True)
    for leaf, ours, theirs in zip(["x", *dict(layer.named_parameters())], found, slopes, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, at=leaf: f"{at}: {m}")
        else:
            assert ours is None or not ours.any(), leaf

    rows_E = (gates_TE[real_T] > 0).sum(0)
    if merged:
        torch.testing.assert_close(statistics.tokens_per_expert_E, gates_TE[real_T].sum(0))
        torch.testing.assert_close(statistics.entropy_sum, torch.special.entr(gates_TE[real_T]).sum())
        assert statistics.dropped == 0
    elif dropped is None:
        assert torch.equal(statistics.tokens_per_expert_E, rows_E.float())
        assert statistics.dropped == 0
    else:
        assert statistics.dropped == dropped > 0
        assert statistics.tokens_per_expert_E.sum() - dropped == rows_E.sum()
    assert statistics.num_tokens == real_T.sum()
    assert statistics.probability_sum_E.sum().item() == pytest.approx(real_T.sum().item(), rel=1e-5)


def test_every_router_has_a_case_and_a_file_that_cites_it():
    assert {kind for kind, *_ in CASES.values()} == set(ROUTERS) == set(ROUTER_SETTINGS)
    assert [name for name, router in ROUTERS.items() if router.Settings is not ROUTER_SETTINGS[name]] == []


@pytest.mark.parametrize("case", CASES)
def test_evaluation_draws_nothing_and_drops_nothing(case):
    kind, top_k, settings, _ = CASES[case]
    layer, (x_BSD, mask_BS) = layer_of(config_of(kind, top_k, settings, router_jitter_noise=0.5)).eval(), inputs()
    state = torch.get_rng_state()
    y_BSD, statistics = layer(x_BSD, mask_BS)
    assert torch.equal(torch.get_rng_state(), state)
    assert statistics.dropped == 0
    for b in range(B):  # and a sequence is treated the same in any batch, and whatever comes later in it
        alone = layer(x_BSD[b : b + 1, :6], mask_BS[b : b + 1, :6])[0]
        torch.testing.assert_close(alone[0], y_BSD[b, :6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_no_segment_sees_what_comes_later(training):
    model = MoEDecoder(config_of("lory", 1, {"segment_length": 4})).train(training)
    init_weights(model, 0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    ids_BS = torch.randint(0, 40, (B, S), generator=torch.Generator().manual_seed(1))
    before = model(ids_BS).logits
    for changed in range(S):
        other_BS = ids_BS.clone()
        other_BS[:, changed] = (other_BS[:, changed] + 7) % 40
        after = model(other_BS).logits
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.equal(after[:, -1], before[:, -1])


def test_the_work_of_mixing_weights_is_counted():
    """Of all experts' weights, once for each segment, beside one expert's for each token."""
    lory, mixtral = config_of("lory", 1, {"segment_length": 4}), config_of("mixtral", 1, {})
    layers, start = lory.num_hidden_layers, E
    expected = train_flops_per_token(mixtral, 16) + 6 * layers * (start + E * lory.expert_parameters / 4)
    assert train_flops_per_token(lory, 16) == pytest.approx(expected)


def test_importance_and_load_losses_are_the_papers():
    config = config_of("noisy_top_k", 2, {})
    layer, (x_BSD, mask_BS) = layer_of(config), inputs()
    parameters, leaves = dict(layer.gate.named_parameters()), [x_BSD, *layer.gate.parameters()]
    noise_TE = draws("normal")["noise_TE"]
    expected = reference.noisy_losses(x_BSD.flatten(0, 1), parameters, mask_BS.flatten(), 2, noise_TE)
    torch.manual_seed(9)
    statistics = RoutingStatistics.stack([layer(x_BSD, mask_BS)[1]])
    losses = router_losses(config)
    assert [(loss.name, loss.coefficient) for loss in losses] == [("importance_loss", 0.1), ("load_loss", 0.1)]
    for found, value in zip(router_loss_values(losses, statistics), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
        pairs = zip(
            torch.autograd.grad(found, leaves, retain_graph=True, allow_unused=True),
            torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True),
            strict=True,
        )
        for ours, theirs in pairs:
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("overflow", ["drop", "next", "residual", "queue"])
def test_the_importance_loss_goes_by_the_choices_whoever_gets_the_room(overflow):
    """So little room that most tokens have no expert at all."""
    limited = {"capacity_factor": 0.2, "overflow": overflow, **({"queue_depth": 0.1} if overflow == "queue" else {})}
    values = []
    for settings in ({}, limited):
        config = config_of("noisy_top_k", 2, {"noise": False, **settings})
        layer, (x_BSD, mask_BS) = layer_of(config), inputs()
        statistics = RoutingStatistics.stack([layer(x_BSD, mask_BS)[1]])
        values.append(router_loss_values(router_losses(config), statistics))
    assert statistics.dropped > 0
    torch.testing.assert_close(values[1], values[0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("entropy_bonus", {"entropy_bonus_coef": 0.3}),
        ("local_entropy_loss", {"local_entropy_coef": 0.3}),
        ("global_entropy_loss", {"global_entropy_coef": 0.3}),
        ("global_entropy_loss", {"global_entropy_coef": 0.3, "global_entropy_threshold": 1.9}),
        ("global_entropy_loss", {"global_entropy_coef": 0.3, "global_entropy_threshold": 0.1}),
    ],
)
def test_entropy_losses_are_those_of_the_distributions(name, settings):
    """LIMoE (Mustafa et al. 2022), section 2.2."""
    config = config_of("mixtral", 2, settings)
    layer, (x_BSD, mask_BS) = layer_of(config), inputs()
    p_TE = (x_BSD.flatten(0, 1) @ layer.gate.weight.T).softmax(-1)[mask_BS.flatten()]
    mean_entropy, entropy_of_mean = (-(p * p.log()).sum(-1).mean() for p in (p_TE, p_TE.mean(0)))
    threshold = settings.get("global_entropy_threshold")
    expected = {
        "entropy_bonus": -mean_entropy,
        "local_entropy_loss": mean_entropy,
        "global_entropy_loss": -entropy_of_mean if threshold is None else (threshold - entropy_of_mean).clamp(min=0),
    }[name]
    losses = router_losses(config)
    assert [loss.name for loss in losses] == [name]
    found = router_loss_values(losses, RoutingStatistics.stack([layer(x_BSD, mask_BS)[1]]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, layer.gate.weight)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert theirs.any() == (threshold != 0.1)


def test_the_capacity_follows_its_schedule():
    settings = {"capacity_factor": 0.5, "initial_capacity_factor": 2.5, "capacity_decay_steps": 4}
    layer, (x_BSD, mask_BS) = layer_of(config_of("switch", 1, settings)), inputs()
    dropped = []
    for step in range(6):
        layer.gate.step = step
        dropped.append(layer(x_BSD, mask_BS)[1].dropped.item())
    assert [layer.gate.settings.capacity_at(step) for step in (0, 1, 2, 4, 9)] == [2.5, 2.0, 1.5, 0.5, 0.5]
    assert dropped == sorted(dropped)
    assert dropped[0] < dropped[4] == dropped[5]


def test_warm_up_spreads_tokens_and_ends():
    plain, (x_BSD, mask_BS) = layer_of(config_of("mixtral", 1, {})), inputs()
    warm = layer_of(config_of("mixtral", 1, {"warmup_steps": 10}))
    x_BSD = x_BSD.detach().repeat(40, 1, 1) * 0.1 + 1.0  # nearly all tokens are alike
    mask_BS = mask_BS.repeat(40, 1)
    wanted = plain(x_BSD, mask_BS)[1].tokens_per_expert_E
    moved = []
    for step in (0, 5, 10):
        warm.gate.step = step
        torch.manual_seed(step)
        counts_E = warm(x_BSD, mask_BS)[1].tokens_per_expert_E
        moved.append((counts_E - wanted).abs().sum().item() / 2 / wanted.sum().item())
        if step == 0:
            assert counts_E.std() / counts_E.mean() < 0.15
    assert moved[0] > 1.5 * moved[1] > 0 == moved[2]
    assert torch.equal(warm.eval()(x_BSD, mask_BS)[0], plain.eval()(x_BSD, mask_BS)[0])


@pytest.mark.parametrize("case", [*CASES, "warm-up"])
def test_recomputation_routes_as_the_first_pass_did(case):
    kind, top_k, settings, _ = CASES.get(case, ("mixtral", 2, {"warmup_steps": 9, "capacity_factor": 1.0}, {}))
    ids_BS = torch.randint(0, 40, (B, S), generator=torch.Generator().manual_seed(1))
    results = []
    for recompute in (False, True):
        model = MoEDecoder(config_of(kind, top_k, settings, router_z_loss_coef=0.01))
        init_weights(model, 0)
        model.model.recompute = recompute
        torch.manual_seed(4)
        output = model(ids_BS, labels=ids_BS)
        output.loss.backward()
        results.append((output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "router",
    [
        {"type": "top_p", "p": 0.5},
        {"type": "gshard"},
        {"warmup_steps": 2},
        {"capacity_factor": 0.7, "overflow": "next"},
        {"type": "batch_prioritised"},
        {"type": "batch_prioritised", "capacity_factor": 0.5, "noise": False},
        {"type": "expert_choice"},
    ],
    ids=lambda router: router.get("type", "warm-up"),
)
def test_a_recomputation_that_differs_in_its_numbers_routes_the_same(router, monkeypatch):
    """As it may in the last bits on a GPU; here it is far more, so that no decision would survive by chance."""
    model = MoEDecoder(config_of(router.get("type", "mixtral"), 2, router))
    init_weights(model, 0)
    model.model.recompute = True
    counts, original = [], Router.logits

    def perturbed(self, x_BSD):
        logits_TE = original(self, x_BSD)
        if len(counts) < 2:
            return logits_TE
        return logits_TE + torch.randn(logits_TE.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(Router, "logits", perturbed)
    for layer in model.model.layers:
        layer.mlp.gate.step = 1
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[1].tolist()))
    ids_BS = torch.randint(0, 40, (8, S), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    model(ids_BS, labels=ids_BS).loss.backward()
    assert counts[2:] == counts[1::-1]


def test_what_differs_by_rounding_alone_is_served_in_order_and_no_more_than_that():
    gate = layer_of(config_of("batch_prioritised", 1, {"capacity_factor": 1.0, "noise": False})).gate

    def granted(*scores):
        score_TR, mask_BS = torch.tensor(scores)[:, None], torch.ones(1, len(scores), dtype=torch.bool)
        expert_TR, capacity_BS = torch.zeros_like(score_TR, dtype=torch.int64), torch.full(mask_BS.shape, 2)
        return gate.assign(expert_TR, score_TR, None, Groups.of(mask_BS), capacity_BS).flatten().tolist()

    for first, second in ((1 - 2**-24, 1.0), (1.0, 1 - 2**-24), (1.0, 1.0)):
        assert granted(0.3, first, second, second) == [False, True, True, False]
    assert granted(0.3, 0.5, 0.5, 0.5001) == [False, True, False, True]

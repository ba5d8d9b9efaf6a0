"""`overflow: residual`: the token stands in for the experts that had no room, times their weights."""

import pytest
import routing_reference as reference
import torch
from test_routers import E, T, by_definition, config_of, inputs, layer_of

from moe_llm.model.moe.routers import ROUTERS

# router, num_experts_per_tok, settings, what the reference is told
CASES = {
    "mixtral": (2, {}, {}),
    "noisy_top_k": (2, {"noise": False}, {"noise_TE": torch.zeros(T, E)}),
    "switch": (1, {}, {"factor": 100.0}),
    "batch_prioritised": (2, {"noise": False}, {"factor": 100.0, "noise_TE": torch.zeros(T, E), "score": "max"}),
    "multi_head": (2, {"heads": 2}, {}),
    "attention": (2, {"heads": 3, "key_size": 5}, {"heads": 3}),
    "transformer": (2, {"width": 8, "heads": 2}, {"heads": 2}),
    "deepseek_moe": (3, {"routed_scaling_factor": 1.5}, {"scale": 1.5, "share": False}),
}
FACTOR = 0.7


def expected(layer, kind: str, x_BSD: torch.Tensor, mask_BS: torch.Tensor) -> tuple[torch.Tensor, int]:
    """y = sum of granted w_e E_e(x) + (sum of denied w_e) x, and how many are denied; without padding's rows."""
    top_k, _, told = CASES[kind]
    if kind == "multi_head":  # whose parts of tokens are what tokens are elsewhere
        parts_BPW = (x_BSD @ layer.gate.head_proj.weight.T).unflatten(-1, (2, -1)).flatten(1, 2)
        y_RW, denied = _expected(layer, "switch", top_k, {"factor": 100.0}, parts_BPW, mask_BS.repeat_interleave(2, 1))
        return y_RW.unflatten(0, (-1, 2)).flatten(1) @ layer.gate.merge_proj.weight.T, denied
    return _expected(layer, kind, top_k, told, x_BSD, mask_BS)


def _expected(layer, kind, top_k, told, x_BSD, mask_BS) -> tuple[torch.Tensor, int]:
    (batch, length), x_TD, real = mask_BS.shape, x_BSD.flatten(0, 1), mask_BS.tolist()
    parameters = dict(layer.gate.named_parameters())
    if kind == "switch":  # there for one expert a token alone
        gates_TE, _ = reference.by_probability(x_TD @ parameters["weight"].T, real, top_k, 100.0, None)
    else:
        gates_TE, _ = getattr(reference, kind)(x_TD, parameters, real, top_k=top_k, **told)
    chosen = [reference.best(row, top_k) for row in gates_TE.tolist()]
    proposals = [chosen[b * length : (b + 1) * length] for b in range(batch)]
    order = None
    if kind == "batch_prioritised":
        best_BS = gates_TE.amax(-1).view(batch, length).tolist()
        order = [reference.best(scores, length) for scores in best_BS]
    granted = reference.seats(proposals, real, FACTOR, top_k, E, order)
    denied, open_TE = 0, torch.zeros_like(gates_TE)
    for t in range(batch * length):
        for choice in range(top_k):
            given = (t // length, t % length, choice) in granted
            open_TE[t, chosen[t][choice]] = given
            denied += not given and real[t // length][t % length]
    kept_T1 = (gates_TE * (1 - open_TE)).sum(-1, keepdim=True)
    return by_definition(x_TD, layer, gates_TE * open_TE) + kept_T1 * x_TD, denied


@pytest.mark.parametrize("kind", CASES)
def test_outputs_and_gradients_are_those_of_the_definition(kind):
    top_k, settings, _ = CASES[kind]
    settings = {**settings, "capacity_factor": FACTOR, "overflow": "residual"}
    layer, (x_BSD, mask_BS) = layer_of(config_of(kind, top_k, settings)), inputs()
    wanted_TD, denied = expected(layer, kind, x_BSD, mask_BS)
    y_BSD, statistics = layer(x_BSD, mask_BS)
    found_TD, real_T = y_BSD.flatten(0, 1), mask_BS.flatten()
    assert statistics.dropped == denied > 0
    torch.testing.assert_close(found_TD[real_T], wanted_TD[real_T], rtol=1e-5, atol=1e-5)
    assert not found_TD[~real_T].any()
    direction_TD = torch.randn(found_TD.shape, generator=torch.Generator().manual_seed(3))
    leaves = {"x": x_BSD, **dict(layer.named_parameters())}
    ours, theirs = (
        torch.autograd.grad((y_TD * direction_TD)[real_T].sum(), list(leaves.values()), allow_unused=True)
        for y_TD in (found_TD, wanted_TD)
    )
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, at=name: f"{at}: {m}")


@pytest.mark.parametrize("kind", CASES)
def test_evaluation_has_no_limit_and_keeps_nothing(kind):
    top_k, settings, _ = CASES[kind]
    held = layer_of(config_of(kind, top_k, {**settings, "capacity_factor": FACTOR, "overflow": "residual"})).eval()
    free = layer_of(config_of(kind, top_k, {**settings, "capacity_factor": None})).eval()
    x_BSD, mask_BS = inputs()
    assert torch.equal(held(x_BSD, mask_BS)[0], free(x_BSD, mask_BS)[0])
    assert held.gate(x_BSD, mask_BS).kept_R is None


def test_weights_still_sum_to_one():
    layer = layer_of(config_of("mixtral", 2, {"capacity_factor": FACTOR, "overflow": "residual"}))
    x_BSD, mask_BS = inputs()
    routing = layer.gate(x_BSD, mask_BS)
    total_T = routing.kept_R.clone().index_add_(0, routing.token_index_N, routing.weight_N)
    torch.testing.assert_close(total_T, mask_BS.flatten().float())


def test_every_router_that_may_pass_on_has_a_case():
    assert set(CASES) == {name for name, router in ROUTERS.items() if "overflow" in router.Settings.model_fields}


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_queue_with_nothing_in_it_changes_nothing(tiles):
    plain = layer_of(config_of("mixtral", 2, {}))
    queued = layer_of(config_of("mixtral", 2, {"capacity_factor": 9.0, "overflow": "queue", "queue_depth": 1.0}))
    queued.experts.tiles = tiles
    x_BSD, mask_BS = inputs()
    torch.testing.assert_close(queued(x_BSD, mask_BS)[0][mask_BS], plain(x_BSD, mask_BS)[0][mask_BS])


@pytest.mark.parametrize("kind", CASES)
def test_a_queue_is_served_by_the_same_experts_in_a_second_round(kind):
    """Outputs, gradients and what is dropped are those of the room of both rounds, and no round takes more than its own."""
    top_k, settings, _ = CASES[kind]
    found = {}
    for name, more in {
        "queue": {"capacity_factor": 0.4, "overflow": "queue", "queue_depth": 0.3},
        "wide": {"capacity_factor": FACTOR},
        "narrow": {"capacity_factor": 0.4},
    }.items():
        layer, (x_BSD, mask_BS) = layer_of(config_of(kind, top_k, {**settings, **more})), inputs()
        rows: list[torch.Tensor] = []
        layer.experts.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[1]))
        y_BSD, statistics = layer(x_BSD, mask_BS)
        leaves = [x_BSD, *layer.parameters()]
        slopes = torch.autograd.grad(y_BSD[mask_BS].square().sum(), leaves, allow_unused=True)
        found[name] = y_BSD[mask_BS], statistics.dropped, slopes, rows
    torch.testing.assert_close(found["queue"][0], found["wide"][0], rtol=1e-5, atol=1e-5)
    assert found["queue"][1] == found["wide"][1] < found["narrow"][1]
    for ours, theirs in zip(found["queue"][2], found["wide"][2], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            # sums are rounded in another order, by as much as their largest terms say
            largest = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)
    first_E, second_E = found["queue"][3]
    assert torch.equal(first_E, found["narrow"][3][0])
    assert torch.equal(first_E + second_E, found["wide"][3][0])
    assert second_E.sum() > 0

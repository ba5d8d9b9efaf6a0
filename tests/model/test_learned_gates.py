"""Gates that learn from the tokens' own losses: REINFORCE's gradient is that of the expected loss, EM's likelihood never
falls and finds planted experts, and the decoder hands both the losses that they need."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_routers import config_of

from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import init_weights
from moe_llm.model.moe.losses import router_loss_values
from moe_llm.model.moe.routers.em import responsibilities
from moe_llm.model.moe.routers.reinforce import ReinforceRouter, log_probability

EXPERTS, TOP_K = 4, 2


def model_of(kind: str, layers: int = 1, **settings) -> MoEDecoder:
    config = config_of(kind, TOP_K, settings, num_local_experts=EXPERTS, num_hidden_layers=layers)
    model = MoEDecoder(config).double().train()
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        if "gate" in name or "experts" in name:
            parameter.data.normal_(0, 0.6, generator=torch.Generator().manual_seed(len(name)))
    return model


def batch(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (1, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "targets": (ids * 7 + 3) % 40}


def own_loss(model: MoEDecoder, name: str, output) -> torch.Tensor:
    names = [loss.name for loss in model.router_losses]
    return router_loss_values(model.router_losses, output.routing)[names.index(name)]


# REINFORCE


def forced(monkeypatch, choice: list[list[int]]) -> None:
    monkeypatch.setattr(ReinforceRouter, "_draw", lambda self, logits_TE: torch.tensor(choice))


def token_losses(model: MoEDecoder, of: dict[str, torch.Tensor]) -> torch.Tensor:
    logits_TV = model(of["input_ids"]).logits[0]
    return F.cross_entropy(logits_TV.float(), of["targets"][0], reduction="none").double()


@pytest.mark.parametrize("baseline", ["learned", "leave_one_out"])
def test_the_mean_policy_gradient_is_that_of_the_expected_loss(monkeypatch, baseline):
    """Both tokens' choices enumerated, in order and without replacement: the weighted sum of the estimator's gradients
    is the gradient of the sum over choices of probability times loss, whatever the baseline."""
    model, of = model_of("reinforce", baseline=baseline), batch(2)
    gate, choices = model.model.layers[0].mlp.gate, list(itertools.permutations(range(EXPERTS), TOP_K))
    if baseline == "learned":
        gate.baseline_weight.data.fill_(0.3)
    seen = {}
    gate.register_forward_hook(lambda _, __, routing: seen.update(logits_TE=routing.logits_TE))
    expected, mean = torch.zeros_like(gate.weight), torch.zeros_like(gate.weight)
    for first, second in itertools.product(choices, choices):
        forced(monkeypatch, [list(first), list(second)])
        losses_T = token_losses(model, of).detach()
        log_pi_T = log_probability(seen["logits_TE"], torch.tensor([first, second]))
        joint = log_pi_T.sum().exp()
        # without a token before it, a document's first one does not count
        objective = joint * losses_T[1] if baseline == "leave_one_out" else joint * losses_T.sum()
        expected += torch.autograd.grad(objective / 2, gate.weight, retain_graph=True)[0]
        policy = own_loss(model, "policy_loss", model(**of))
        mean += joint.detach() * torch.autograd.grad(policy, gate.weight)[0]
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-7)
    assert expected.abs().max() > 1e-3


def test_experts_are_drawn_in_proportion_and_evaluation_takes_the_likeliest():
    model = model_of("reinforce")
    gate, times = model.model.layers[0].mlp.gate, 20000
    logits_E = torch.tensor([1.0, 0.2, -0.5, 0.4])
    torch.manual_seed(0)
    drawn_TK = gate._draw(logits_E.expand(times, -1))
    for pair in itertools.permutations(range(EXPERTS), TOP_K):
        share = (drawn_TK == torch.tensor(pair)).all(1).double().mean().item()
        assert share == pytest.approx(log_probability(logits_E[None], torch.tensor([pair])).exp().item(), abs=0.01)
    total = sum(
        log_probability(logits_E[None], torch.tensor([pair])).exp()
        for pair in itertools.permutations(range(EXPERTS), 2)
    )
    assert total.item() == pytest.approx(1, abs=1e-6)
    assert gate.eval()._draw(logits_E[None]).tolist() == [[0, 3]]


def test_the_baseline_is_fitted_to_the_loss_and_a_load_penalty_counts():
    model, of = model_of("reinforce", load_coef=0.5, sample=False), batch(6)
    gate = model.model.layers[0].mlp.gate
    gate.baseline_weight.data.zero_()
    plain_T = token_losses(model, of)
    assert own_loss(model, "baseline_loss", model(**of)).item() == pytest.approx(
        plain_T.square().mean().item(), rel=1e-5
    )
    gate.load.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    seen = {}
    gate.register_forward_hook(lambda _, __, routing: seen.update(logits_TE=routing.logits_TE))
    found = own_loss(model, "baseline_loss", model(**of))
    chosen_TK = seen["logits_TE"].topk(TOP_K).indices
    cost_T = plain_T + 0.5 * (gate.load[chosen_TK] * EXPERTS - 1).mean(-1)
    assert found.item() == pytest.approx(cost_T.square().mean().item(), rel=1e-5)


def test_a_penalty_of_cost_counts_the_widths_of_a_tokens_experts():
    sizes = [4, 8, 16, 4]
    model = MoEDecoder(
        config_of("reinforce", TOP_K, {"cost_coef": 0.3}, num_local_experts=EXPERTS, expert_sizes=sizes)
    ).train()
    gate, chosen_TK = model.model.layers[0].mlp.gate, torch.tensor([[0, 1], [2, 2]])
    expected = [0.3 * ((4 + 8) / 2 / 8 - 1), 0.3 * (16 / 8 - 1)]
    torch.testing.assert_close(gate._penalty(chosen_TK), torch.tensor(expected))


def test_load_is_a_running_mean_that_begins_with_the_first_step():
    model = model_of("reinforce", load_coef=0.5, load_rate=0.25)
    gate, total = model.model.layers[0].mlp.gate, model(**batch(8)).routing.layers()[0]
    share_E = total.tokens_per_expert_E / total.tokens_per_expert_E.sum()
    gate.after_step(total)
    torch.testing.assert_close(gate.load, share_E.float())
    gate.after_step(total._replace(tokens_per_expert_E=torch.tensor([8.0, 0, 0, 0])))
    torch.testing.assert_close(gate.load, share_E.float() * 0.75 + torch.tensor([0.25, 0, 0, 0]))


def test_gates_find_the_better_expert():
    """Of two experts one is right for one half of the tokens and the other for the rest: after some steps of the policy's
    gradient alone the likeliest choices are the right ones."""
    torch.manual_seed(0)
    kind_T, x_TD = torch.arange(64) % 2, torch.randn(64, 6)
    x_TD[:, 0] = 2.0 * kind_T - 1
    weight_ED = torch.zeros(2, 6, requires_grad=True)
    optimizer = torch.optim.Adam([weight_ED], lr=0.05)
    for _ in range(150):
        logits_TE = x_TD @ weight_ED.T
        drawn_TK = (logits_TE - torch.empty_like(logits_TE).exponential_().log()).topk(1).indices
        cost_T = (drawn_TK[:, 0] != kind_T).float()
        (cost_T - cost_T.mean()).mul(log_probability(logits_TE, drawn_TK)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ((x_TD @ weight_ED.T).argmax(1) == kind_T).all()


# Expectation maximisation


def mixture_loss(model: MoEDecoder, of: dict[str, torch.Tensor]) -> torch.Tensor:
    """-log sum over experts of g_e p_e, summed over tokens: each expert alone in the last layer, by a plain forward pass
    up to it."""
    layer, seen = model.model.layers[-1], {}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.update(x_BSD=inputs[0])),
        layer.register_forward_hook(lambda _, __, out: seen.update(stream_BSD=out[0])),
    ]
    model(of["input_ids"])
    for hook in hooks:
        hook.remove()
    x_TD, experts = seen["x_BSD"].flatten(0, 1), layer.mlp.experts
    log_gate_TE = (x_TD.float() @ layer.mlp.gate.weight.float().T).log_softmax(-1)
    parts = []
    for e in range(EXPERTS):
        gate_up, down = experts.gate_up_proj[e], experts.down_proj[e]
        gate_TF, up_TF = (x_TD @ gate_up.T).chunk(2, -1)
        hidden_TD = seen["stream_BSD"].flatten(0, 1) + (F.silu(gate_TF) * up_TF) @ down.T
        logits_TV = model.lm_head(model.model.norm(hidden_TD)).float()
        parts.append(log_gate_TE[:, e] - F.cross_entropy(logits_TV, of["targets"][0], reduction="none"))
    return -torch.stack(parts, -1).logsumexp(-1).sum()


@pytest.mark.parametrize("recompute", [False, True])
def test_soft_ems_gradient_is_that_of_the_mixtures_likelihood(recompute):
    model, of = model_of("em", layers=2), batch(7)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(mixture_loss(model, of) / 7, list(parameters.values()), allow_unused=True)
    model.model.recompute = recompute
    found = model(**of)
    ours = own_loss(model, "gate_m_step_loss", found) + own_loss(model, "expert_m_step_loss", found)
    ours = torch.autograd.grad(ours, list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, ours, expected, strict=True):
        if b is None:
            assert a is None or not a.any(), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_the_last_gate_learns_by_em_alone_and_its_output_is_mixtrals():
    em, of = model_of("em", layers=2), batch(7)
    found = em(**of)
    slopes = torch.autograd.grad(
        found.loss_sum, [layer.mlp.gate.weight for layer in em.model.layers], allow_unused=True
    )
    assert slopes[0].any()
    assert slopes[1] is None or not slopes[1].any()
    torch.testing.assert_close(found.logits, em.eval()(of["input_ids"]).logits)


def test_hard_em_makes_the_likeliest_expert_responsible():
    log_gate = torch.tensor([[0.5, 0.3, 0.2]]).log()
    log_likelihood = torch.tensor([[0.1, 0.4, 0.2]]).log()
    soft = responsibilities(log_gate, log_likelihood)
    torch.testing.assert_close(soft, torch.tensor([[0.05, 0.12, 0.04]]) / 0.21)
    assert responsibilities(log_gate, log_likelihood, hard=True).tolist() == [[0, 1, 0]]


def fit(x_ND, log_likelihoods, m_step_experts, steps, hard=False):
    """EM with the gate's M-step by gradient, the experts' in closed form; the likelihood after each step."""
    gate, curve = torch.zeros(2, x_ND.shape[1], dtype=torch.float64, requires_grad=True), []
    for _ in range(steps):
        log_gate_NE = (x_ND @ gate.T).log_softmax(-1)
        share_NE = responsibilities(log_gate_NE, log_likelihoods(), hard=hard)
        m_step_experts(share_NE)
        for _ in range(20):
            log_gate_NE = (x_ND @ gate.T).log_softmax(-1)
            loss = -(share_NE * log_gate_NE).sum() / len(x_ND)
            (slope,) = torch.autograd.grad(loss, gate)
            gate.data -= 0.5 * slope
        log_gate_NE = (x_ND @ gate.T).log_softmax(-1)
        curve.append((log_gate_NE + log_likelihoods()).logsumexp(-1).sum().item())
    return gate.detach(), curve


@pytest.mark.parametrize("hard", [False, True])
def test_em_recovers_planted_regressions_and_its_likelihood_never_falls(hard):
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.cat([torch.randn(400, 1, generator=generator), torch.ones(400, 1)], 1).double()
    kind_N = (x_ND[:, 0] > 0.3).long()
    planted_ED = torch.tensor([[1.5, 0.5], [-2.0, 3.0]]).double()
    y_N = (x_ND * planted_ED[kind_N]).sum(1) + 0.1 * torch.randn(400, generator=generator)
    experts_ED = torch.tensor([[0.5, 0.0], [-0.5, 1.0]]).double()

    def log_likelihoods():  # of unit-free Gaussians of deviation 0.3
        return -((y_N[:, None] - x_ND @ experts_ED.T) ** 2) / (2 * 0.3**2)

    def m_step(share_NE):
        for e in range(2):
            weighted_ND = x_ND * share_NE[:, e : e + 1]
            experts_ED[e] = torch.linalg.solve(weighted_ND.T @ x_ND + 1e-9 * torch.eye(2).double(), weighted_ND.T @ y_N)

    gate_ED, curve = fit(x_ND, log_likelihoods, m_step, 40, hard)
    if not hard:
        assert all(b >= a - 1e-9 for a, b in itertools.pairwise(curve))
    assert curve[-1] > curve[0]
    torch.testing.assert_close(experts_ED, planted_ED, atol=0.1, rtol=0)
    assert ((x_ND @ gate_ED.T).argmax(1) == kind_N).double().mean() > 0.95


def test_em_recovers_planted_classifiers_and_its_likelihood_never_falls():
    """Two experts over three classes, each of which knows the half of the space in which it was planted."""
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.cat([torch.randn(600, 2, generator=generator), torch.ones(600, 1)], 1).double()
    kind_N, side_N = (x_ND[:, 0] > 0).long(), (x_ND[:, 1] > 0).long()
    y_N = torch.where(kind_N == 0, side_N, 2 - side_N)  # one says 0 or 1, the other 2 or 1, by the same sign
    weight_ECD = (0.1 * torch.randn(2, 3, 3, generator=generator)).double().requires_grad_()

    def log_p_NE():
        return torch.einsum("ecd,nd->nec", weight_ECD, x_ND).log_softmax(-1)[torch.arange(600), :, y_N]

    def m_step(share_NE):
        for _ in range(20):
            loss = -(share_NE * log_p_NE()).sum() / 600
            (slope,) = torch.autograd.grad(loss, weight_ECD)
            weight_ECD.data -= 1.0 * slope

    gate_ED, curve = fit(x_ND, log_p_NE, m_step, 60)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(curve))
    taken_N = (x_ND @ gate_ED.T).argmax(1)
    said_N = torch.einsum("ecd,nd->nec", weight_ECD, x_ND)[torch.arange(600), taken_N].argmax(-1)
    assert (said_N == y_N).double().mean() > 0.95
    agree = (taken_N == kind_N).double().mean().item()
    assert max(agree, 1 - agree) > 0.9


# Balance by difficulty


def test_an_expert_of_difficult_tokens_gets_fewer_by_a_bounded_step():
    """The load is tokens and losses in the proportion that is asked for; the bias moves against it by at most the rate."""
    model, of = model_of("bias_balanced", loss_share=0.75, update_rate=0.1), batch(12)
    of["targets"][0, :3] = -100
    gate, seen = model.model.layers[0].mlp.gate, {}
    gate.register_forward_hook(lambda _, __, routing: seen.update(routing._asdict()))
    routing = model(**of).routing.layers()[0]
    counts_E, losses_E = torch.zeros(EXPERTS, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
    losses_T = token_losses(model, {**of, "targets": of["targets"].clamp(min=0)})
    losses_T[:3] = 0
    expert_N = torch.arange(EXPERTS).repeat_interleave(seen["counts_E"])
    for token, expert in zip(seen["token_index_N"].tolist(), expert_N.tolist()):
        counts_E[expert] += 1
        losses_E[expert] += losses_T[token].item()
    torch.testing.assert_close(routing.extra_X.double(), losses_E, rtol=1e-5, atol=1e-6)
    gate.after_step(routing)
    load_E = 0.25 * counts_E / counts_E.mean() + 0.75 * losses_E / losses_E.mean()
    expected_E = 0.1 * (1 - load_E).clamp(-1, 1)
    torch.testing.assert_close(gate.e_score_correction_bias.double(), expected_E, rtol=1e-5, atol=1e-7)
    gate.e_score_correction_bias.zero_()
    one = torch.tensor([1000.0, 1, 1, 1])
    gate.after_step(routing._replace(tokens_per_expert_E=one * 0 + 5, extra_X=one))
    assert gate.e_score_correction_bias[0].item() == pytest.approx(-0.1)  # as many tokens, far more loss
    assert (gate.e_score_correction_bias[1:] > 0).all()
    assert gate.e_score_correction_bias.abs().max().item() <= 0.1 + 1e-7


def test_a_wide_expert_gets_fewer_tokens_where_time_counts():
    config = config_of("bias_balanced", TOP_K, {"time_share": 0.5}, num_local_experts=4, expert_sizes=[2, 6, 4, 4])
    gate = MoEDecoder(config).model.layers[0].mlp.gate
    even = MoEDecoder(config)(**batch(4)).routing.layers()[0]._replace(tokens_per_expert_E=torch.full((4,), 6.0))
    gate.after_step(even)
    expected_E = 0.001 * torch.tensor([1 - 0.75, 1 - 1.25, 0, 0])
    torch.testing.assert_close(gate.e_score_correction_bias, expected_E, atol=1e-8, rtol=1e-4)


def test_balance_by_difficulty_is_unmoved_where_nothing_was_learned():
    gate = model_of("bias_balanced", loss_share=1.0).model.layers[0].mlp.gate
    gate.after_step(
        model_of("bias_balanced", loss_share=1.0)(**batch(4)).routing.layers()[0]._replace(extra_X=torch.zeros(4))
    )
    assert not gate.e_score_correction_bias.any()

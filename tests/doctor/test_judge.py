"""What the doctor makes of numbers that were seen: which part of a gradient is wrong, what weights begin with, and chance."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.training import MODEL, config

from moe_llm.doctor.compare import Unsure, resumed, tolerances, weights
from moe_llm.doctor.judge import explain_gradients, judge_random
from moe_llm.doctor.observe import Held, Observation
from moe_llm.doctor.oracle.initial import wrong_weights
from moe_llm.model.init import build_model

DRAW = np.random.default_rng(0)
SHARES = {
    (number, loss): {name: size * DRAW.standard_normal(300) for name in ("a", "b")}
    for number in range(2)
    for loss, size in (("language-model loss", 1.0), ("balance loss", 0.02), ("z-loss", 0.01))
}
CUT = {"a": SHARES[0, "z-loss"]["a"], "b": 0 * SHARES[0, "z-loss"]["b"]}


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({(0, "balance loss"): 2, (1, "balance loss"): 2}, "in the gradients the balance loss counts 2.00 times"),
        ({(0, "z-loss"): 0, (1, "z-loss"): 0}, "in the gradients the z-loss counts 0.00 times"),
        ({key: 0 for key in SHARES if key[0] == 1}, "micro-batch 2 of 2 counts 0.00 times in the gradients"),
        ({(0, "z-loss"): 3, (1, "balance loss"): 2}, ""),
    ],
)
def test_a_loss_or_a_micro_batch_that_counts_otherwise_is_named(counts, words):
    found = {
        name: sum(counts.get(key, 1) * share[name] for key, share in SHARES.items()).astype(np.float32)
        for name in ("a", "b")
    }
    assert explain_gradients(found, SHARES) == words


def test_gradients_that_no_sum_of_the_losses_gives_are_not_explained():
    found = {name: sum(share[name] for share in SHARES.values()) + DRAW.standard_normal(300) for name in ("a", "b")}
    assert explain_gradients(found, SHARES) == ""


def initial(seed):
    cfg = config(1, 1, 1)
    named = build_model(cfg.model, seed).named_parameters()
    return {name: parameter.detach().numpy() for name, parameter in named}


def wrong_of(weights):
    return wrong_weights(weights, MODEL["initializer_range"], MODEL["num_hidden_layers"])


@pytest.mark.parametrize("seed", range(5))
def test_initial_weights_are_as_configured(seed):
    assert wrong_of(initial(seed)) == []


WEIGHT, EXPERTS = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: {WEIGHT: 1.5 * weights[WEIGHT]}, f"{WEIGHT}: deviates by"),
        (lambda weights: {WEIGHT: weights[WEIGHT] + 0.1}, f"{WEIGHT}: has a mean of"),
        (lambda weights: {WEIGHT: weights[WEIGHT.replace("1", "0")]}, f"{WEIGHT}: begins with the weights of"),
        (
            lambda weights: {EXPERTS: np.stack([weights[EXPERTS][0]] * len(weights[EXPERTS]))},
            f"{EXPERTS}, expert 1: begins with the weights of {EXPERTS}, expert 0",
        ),
        (lambda weights: {"model.norm.weight": 0 * weights["model.norm.weight"]}, "model.norm.weight: is not 1"),
    ],
)
def test_initial_weights_that_are_not_are_named(change, words):
    weights = initial(0)
    assert wrong_of({**weights, **change(weights)})[0].startswith(words)


def test_random_numbers_differ_over_ranks_and_steps():
    def ranks(*states):
        return [Observation(random=list(of_rank)) for of_rank in states]

    assert not judge_random(ranks("ab", "cd"))[0].failed
    assert judge_random(ranks("ab", "ac"))[0].where == "rank 1, step 1: draws the random numbers of rank 0, step 1"
    assert judge_random(ranks("aa"))[0].where == "rank 0, step 2: draws the random numbers of rank 0, step 1"


def test_a_gradient_that_rounding_decides_is_set_aside_and_many_are_not():
    due = np.full(1000, 1.0, np.float32)
    off = due.copy()
    off[:3] *= -1
    unsure = Unsure()
    unsure.add({"a": off, "b": -due}, {"a": due, "b": due})
    assert np.flatnonzero(unsure.elements("a", due)).tolist() == [0, 1, 2]
    assert not unsure.elements("b", due).any()
    assert not unsure.elements("frozen", due).any()
    unsure.add({"a": -due}, {"a": due})  # as where a step has begun from weights that were apart there
    assert np.flatnonzero(unsure.elements("a", due)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("rate", "failed"), [(0.5, False), (0.25, True)])
def test_a_resumed_run_has_the_rates_of_one_that_was_not_interrupted(rate, failed):
    def run(first, rates):
        held = {"weight": {"a": Held(None, np.ones(1))}}
        records = [{"loss": 1.0, "lr": lr} for lr in rates]
        return SimpleNamespace(first_step=first, start=held, at_save=held, records=records, samples=[])

    found = resumed("resume", "key", [run(0, [1.0, 0.5])], [run(1, [rate])], [], tolerances(config(1, 1, 1)))
    assert found[-1].failed == failed
    assert found[-1].where == ("step 2, the learning rate" if failed else "")


@pytest.mark.parametrize(
    ("optimizer", "noise", "far", "failed"),
    [
        ("adamw", 0.0, 2e-3, True),
        ("adamw", 5e-5, 2e-3, False),  # gradients of the second step follow a weight that rounding turned in the first
        ("adamw", 1.0, 2e-2, True),
        ("sgd", 5e-5, 2e-3, True),
    ],
)
def test_weights_may_depart_by_what_a_later_gradient_does_and_no_more(optimizer, noise, far, failed):
    """Root mean squares: every other gradient by `noise` of it, every weight by `far` of its change."""
    value = DRAW.standard_normal(1000)
    other = value * np.where(np.arange(1000) % 2, 1, 1 + noise * 2**0.5)

    def seen(gradient, change):
        states = [{"a": Held(None, value + change * step), "frozen": Held(None, value)} for step in (1, 2)]
        gradients = [{"a": Held(None, one)} for one in (value, gradient)]
        start = {"weight": {"a": Held(None, value), "frozen": Held(None, value)}}
        return SimpleNamespace(start=start, weights=states, gradients=gradients)

    one, ranks = seen(value, 0.1), seen(other, 0.1)
    ranks.weights[1]["a"] = Held(None, one.weights[1]["a"].value + 0.2 * far)
    allowed = tolerances(config(1, 1, 1, optimizer=optimizer))
    assert weights([ranks], one, allowed).failed == failed

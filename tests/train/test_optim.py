"""The learning rate is a pure function of the step; the optimizer has what the configuration says."""

import math
from itertools import pairwise

import pytest
import torch
from support.training import config

from moe_llm.model.init import build_model
from moe_llm.train.optim import build_optimizer, parameter_groups
from moe_llm.train.trainer import learning_rate

TOTAL = 100


def rates(**optim) -> list[float]:
    cfg = config(1, 1, 1, optim={"lr": 2.0, "min_lr_ratio": 0.1, **optim}, train={"max_steps": TOTAL})
    return [learning_rate(cfg, step) for step in range(TOTAL + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_rises_in_equal_steps_from_above_zero(schedule):
    found = rates(schedule=schedule, warmup_steps=10)
    assert found[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert found[10] == 2.0
    assert rates(schedule=schedule, warmup_steps=0)[0] == 2.0


def test_cosine():
    found = rates(schedule="cosine", warmup_steps=10)
    assert found[55] == pytest.approx(2.0 * 0.55), "half way between the rate and its floor"
    assert found[TOTAL] == pytest.approx(0.2)
    assert 0.2 < found[TOTAL - 1] < 0.2 * 1.01
    assert all(a > b for a, b in pairwise(found[10:]))
    assert found[40] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 3)))


def test_wsd_is_constant_until_its_decay():
    found = rates(schedule="wsd", warmup_steps=10, decay_ratio=0.25)
    assert found[10:76] == [2.0] * 66
    falls = [a - b for a, b in pairwise(found[75:])]
    assert falls == pytest.approx([1.8 / 25] * 25)
    assert found[TOTAL] == pytest.approx(0.2)


def test_constant_stays():
    assert set(rates(schedule="constant", warmup_steps=0)) == {2.0}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_the_floor_is_never_undercut(schedule, floor):
    found = rates(schedule=schedule, min_lr_ratio=floor)
    assert min(found) == pytest.approx(2.0 * floor)
    assert max(found) == 2.0


def test_weight_decay_is_for_matrices_alone_and_all_parameters_are_in_one_group():
    model = build_model(config(1, 1, 1).model, seed=0)
    matrices, vectors = parameter_groups(model, 0.3)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] for p in vectors["params"])
    assert not any("norm" in names[id(p)] for p in matrices["params"])
    assert sorted(names[id(p)] for g in (matrices, vectors) for p in g["params"]) == sorted(names.values())


def test_frozen_parameters_are_in_no_group():
    model = build_model(config(1, 1, 1).model, seed=0)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    [group] = parameter_groups(model, 0.3)
    assert group["name"] == "vectors"


def one_update(**optim) -> torch.Tensor:
    """What two steps with gradients 1 and 3 make of a weight of 1."""
    weight = torch.nn.Parameter(torch.ones(1, 1))
    cfg = config(1, 1, 1, optim=optim).optim
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.0}], cfg)
    for gradient in (1.0, 3.0):
        weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    return weight.detach()


def test_adamw_follows_its_formula_with_the_given_betas_and_eps():
    lr, b1, b2, eps = 0.1, 0.7, 0.6, 0.5
    w = m = v = 0.0
    w = 1.0
    for t, g in ((1, 1.0), (2, 3.0)):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    assert one_update(name="adamw", lr=lr, betas=[b1, b2], eps=eps).item() == pytest.approx(w, rel=1e-6)


def test_sgd_is_plain():
    assert one_update(name="sgd", lr=0.1).item() == pytest.approx(1 - 0.1 * 4)

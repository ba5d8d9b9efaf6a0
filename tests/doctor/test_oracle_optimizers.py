"""The second opinion of every optimizer: it agrees with the package's, and names what is wrong with one that departs."""

import numpy as np
import pytest
import torch
from support.training import config

from moe_llm.config.optim import OPTIMIZERS
from moe_llm.distributed.adamw_8bit import AdamW8bit
from moe_llm.doctor.examine import other_stage
from moe_llm.doctor.judge import judge_optimizer
from moe_llm.doctor.observe import Held, Observation
from moe_llm.doctor.oracle.optimizer import KINDS
from moe_llm.doctor.oracle.schedule import rate
from moe_llm.model.init import build_model
from moe_llm.train.optim import build_optimizer, groups_by_part, parameter_groups

STEPS = 4
OPTIM = {
    "betas": [0.9, 0.95],
    "schedule": "constant",
    "warmup_steps": 2,
    "lr": 0.01,
    "weight_decay": 0.3,
    "grad_clip": 0.0,
}


def configured(kind, **optim):
    return config(
        1,
        1,
        1,
        optim={**OPTIM, "name": kind, **optim},
        model={"num_hidden_layers": 1},
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 2},
    )


def trained(done, as_if=None):
    """What `done` is said to do, done as `as_if` says: gradients are random, some of them zero."""
    as_if = as_if or done
    model = build_model(done.model, seed=0)
    named = dict(model.named_parameters())
    groups = groups_by_part(model, parameter_groups(model, as_if.optim.weight_decay, as_if.optim.name), as_if)
    optimizer = build_optimizer(groups, as_if.optim)
    draw = torch.Generator().manual_seed(1)

    def held(tensors):
        return {name: Held(None, tensor.detach().numpy().copy()) for name, tensor in tensors.items()}

    seen = Observation(start={"weight": held(named)})
    for step in range(STEPS):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            parameter.grad[torch.rand(parameter.shape, generator=draw) < 0.2] = 0
        seen.gradients.append(held({name: p.grad for name, p in named.items()}))
        norm = float(np.sqrt(sum((g.value.astype(np.float64) ** 2).sum() for g in seen.gradients[-1].values())))
        lr = rate(as_if.optim, step, STEPS)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_multiplier", 1.0)
        optimizer.step()
        seen.weights.append(held(named))
        seen.records.append({"grad_norm": norm, "lr": rate(done.optim, step, STEPS)})
        if step + 1 == as_if.checkpoint.every_steps:
            for kind in OPTIMIZERS[as_if.optim.name].tensors:
                states = {name: _state(optimizer, p, kind) for name, p in named.items()}
                seen.at_save[kind] = held({name: state for name, state in states.items() if state is not None})
    return judge_optimizer(done, seen)


def _state(optimizer, parameter, kind):
    if isinstance(optimizer, AdamW8bit):
        return optimizer.read(parameter, kind, 0, parameter.numel()).view_as(parameter)
    return optimizer.state[parameter].get(kind)


def test_there_is_a_second_opinion_of_every_optimizer():
    assert set(KINDS) == set(OPTIMIZERS)


def test_what_has_no_second_opinion_is_said_not_to_be_judged(monkeypatch):
    monkeypatch.setattr("moe_llm.doctor.oracle.optimizer.KINDS", ("sgd",))
    [finding] = judge_optimizer(configured("adamw"), Observation(start={}))
    assert finding.status == "NOTE"
    assert "not judged" in finding.check
    assert "optim.name=adamw" in finding.check


@pytest.mark.parametrize("kind", KINDS)
def test_updates_and_averages_are_those_of_the_second_opinion(kind):
    rates = {"lr_multipliers": {"experts": 0.5, "router": 2.0}}
    found = {finding.key: finding for finding in trained(configured(kind, **rates))}
    assert not any(finding.failed for finding in found.values()), found
    assert ("oracle_moments" in found) == bool(OPTIMIZERS[kind].tensors)


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        ("muon", {"weight_decay": 0.0}, "weight decay is not applied"),
        ("schedule_free", {"weight_decay": 0.0}, "weight decay is not applied"),
        ("lion", {"weight_decay": 0.6}, "weight decay is applied twice"),
        ("muon", {"lr": 0.03}, "the learning rate is multiplied by 3"),
        ("sgd", {"lr": 0.03}, "the learning rate is multiplied by 3"),
    ],
)
def test_a_wrong_decay_or_rate_is_found_and_named(kind, wrong, words):
    found = {finding.key: finding for finding in trained(configured(kind), configured(kind, **wrong))}
    assert found["oracle_updates"].failed
    assert words in found["oracle_updates"].evidence["why"]


WRONG = [
    ("muon", {"muon": {"momentum": 0.5}}),
    ("muon", {"muon": {"nesterov": False}}),
    ("muon", {"muon": {"adjust_lr": "original"}}),
    ("muon", {"muon": {"ns_steps": 1}}),
    ("muon", {"betas": [0.5, 0.95]}),
    ("lion", {"betas": [0.5, 0.99]}),
    ("lion", {"betas": [0.9, 0.5]}),
    ("schedule_free", {"betas": [0.5, 0.95]}),
    ("schedule_free", {"betas": [0.9, 0.5]}),
    ("schedule_free", {"eps": 1e-1}),
    ("schedule_free", {"warmup_steps": 0}),
    ("adamw", {"eps": 1e-2}),
]


@pytest.mark.parametrize(("kind", "wrong"), WRONG)
def test_a_setting_that_does_not_act_is_found(kind, wrong):
    found = {finding.key: finding for finding in trained(configured(kind), configured(kind, **wrong))}
    assert found["oracle_updates"].failed


@pytest.mark.parametrize("kind", ["muon", "lion", "schedule_free"])
def test_another_optimizer_in_its_place_is_named(kind):
    found = {finding.key: finding for finding in trained(configured(kind), configured("adamw"))}
    assert found["oracle_updates"].evidence["why"] == f"adamw is used in place of {kind}"


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_resumed_in_another_zero_stage_that_the_optimizer_knows(kind):
    for stage in OPTIMIZERS[kind].zero_stages:
        found = other_stage(config(1, 1, 1, stage=stage, optim={"name": kind, "schedule": "constant"}))
        assert found != stage
        assert found in OPTIMIZERS[kind].zero_stages

"""Perturbed embeddings and routers in turns: ranks equal one process, in every ZeRO stage, and what is idle stays."""

import itertools
from functools import partial

import pytest
import torch
from support.ci import dear
from support.training import config, difference, train_steps

from moe_llm.families.hf import is_router

MICRO = 3
CASES = {
    "perturbed, fast": {"epsilon": 0.3},
    "perturbed, projected": {"epsilon": 0.05, "norm": "linf", "steps": 2},
    "in turns": {"router_every": 2},
    "both": {"epsilon": 0.2, "router_every": 3},
}


def run_of(world: int, case: str, *, ep: int = 1, stage: int = 1, optimizer: str = "adamw", precision: str = "fp32"):
    train = {"adversarial": CASES[case], "precision": precision}
    return config(2 * MICRO // world, 2, world, ep=ep, stage=stage, optimizer=optimizer, train=train)


def largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("case", "stage"),
    dear(itertools.product(CASES, (1, 2, 3)), *((case, (1, 2, 3)[i % 3]) for i, case in enumerate(CASES))),
)
def test_two_ranks_equal_one_process(two_ranks, case, stage):
    expected = train_steps(run_of(1, case, optimizer="sgd"), 4)
    found = two_ranks.run(train_steps, run_of(2, case, ep=2, stage=stage, optimizer="sgd"), 4)
    for per_rank in found:
        assert largest(per_rank["losses"], expected["losses"]) < 1e-5
        assert largest(per_rank["norms"], expected["norms"]) < 1e-5
    for what in ("gradients", "weights"):
        worst, where = difference(found, expected, what)
        assert worst < 1e-5, f"{what} of {where}"


@pytest.mark.parametrize(
    ("stage", "precision"), dear([(s, p) for s in (1, 2, 3) for p in ("fp32", "bf16")], (1, "fp32"), (3, "bf16"))
)
def test_what_is_idle_is_unchanged_to_the_bit(two_ranks, stage, precision):
    cfg = run_of(2, "in turns", ep=2, stage=stage, precision=precision)
    states = [two_ranks.run(train_steps, cfg, steps) for steps in (1, 2, 3)]
    for before, after, routers in ((states[0], states[1], True), (states[1], states[2], False)):
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            for old, new in zip(before, after):
                for name, (_, tensor) in new[kind].items():
                    assert torch.equal(tensor, old[kind][name][1]) == (is_router(name) != routers), (kind, name)


@pytest.mark.parametrize(("stage", "first"), dear([(1, 1), (2, 2), (3, 3)], (2, 2)))
def test_a_run_resumes_in_its_turn_and_in_another_layout(two_ranks, tmp_path, stage, first):
    """With as many updates of each part as it has had, which Adam's bias correction needs."""
    straight = train_steps(run_of(1, "both"), 6)
    split = run_of(2, "both", ep=2, stage=stage)
    begun = two_ranks.run(partial(train_steps, save=str(tmp_path / "ranks")), split, first)
    alone = train_steps(run_of(1, "both"), 6 - first, source=begun[0]["saved"], first=first)
    assert largest(begun[0]["losses"] + alone["losses"], straight["losses"]) < 1e-5
    saved = train_steps(run_of(1, "both"), first, save=str(tmp_path / "one"))["saved"]
    ranks = two_ranks.run(partial(train_steps, source=saved, first=first), split, 6 - first)
    assert largest(ranks[0]["losses"], straight["losses"][first:]) < 1e-5
    for found in ([alone], ranks):
        worst, where = difference(found, straight, "weights")
        assert worst < 1e-4, where

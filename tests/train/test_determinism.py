"""Same seed, same layout: the same bits, twice."""

import pytest
import torch
from support.ci import dear
from support.training import config, train_steps

STEPS = 4


def twice(cfg) -> list[dict]:
    return [train_steps(cfg, STEPS) for _ in range(2)]


def assert_same(first: dict, second: dict) -> None:
    for values in ("losses", "aux", "norms"):
        assert first[values] == second[values], values
    for kind in ("gradients", "weights", "exp_avg", "exp_avg_sq"):
        for name, (_, tensor) in first[kind].items():
            assert torch.equal(tensor, second[kind][name][1]), f"{kind} of {name}"


def cfg_of(world: int, precision: str, ep: int = 1, stage: int = 1):
    return config(
        2,
        2,
        world,
        ep=ep,
        stage=stage,
        optimizer="adamw",
        model={"router_jitter_noise": 0.1},
        train={
            "max_steps": 100,
            "micro_batch_size": 2,
            "global_batch_size": 4 * world,
            "precision": precision,
            "device": "cpu",
        },
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_twice(precision):
    assert_same(*twice(cfg_of(1, precision)))


@pytest.mark.parametrize(
    ("ep", "stage", "precision"), dear([(2, 1, "bf16"), (2, 2, "fp32"), (2, 3, "fp32")], (2, 1, "bf16"))
)
def test_two_ranks_twice(two_ranks, ep, stage, precision):
    found = two_ranks.run(twice, cfg_of(2, precision, ep, stage))
    for first, second in found:
        assert_same(first, second)
    assert found[0][0]["losses"] == found[1][0]["losses"], "ranks tell different losses"

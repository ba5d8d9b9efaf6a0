"""What is frozen stays as it is, to the bit, in every layout, and costs nothing; what is trained is trained as in one
process."""

import pytest
import torch
from support.training import config, difference, train_steps

from moe_llm.families.hf import is_expert

CHOICES = {
    "experts": {"trainable": "experts"},
    "router": {"trainable": "router"},
    "attention": {"trainable": ["*.self_attn.[qk]_proj.*", "lm_head.*"]},
    "some_experts": {"trainable": "all", "experts": [1, 2]},
    "experts_of_one_rank": {"trainable": "experts", "experts": [3]},
}
STEPS = 3


def run(world: int, choice: str, *, ep: int = 2, stage: int = 1, optimizer: str = "adamw", **more):
    more = {"finetune": CHOICES[choice], **more}
    return config(4 // world, 2, world, ep=ep, stage=stage, optimizer=optimizer, **more)


@pytest.fixture(scope="module")
def start() -> dict:
    return train_steps(run(1, "experts", ep=1), 0)["weights"]


@pytest.fixture(scope="module")
def alone():
    cache: dict = {}

    def get(choice: str) -> dict:
        if choice not in cache:
            cache[choice] = train_steps(run(1, choice, ep=1), STEPS)
        return cache[choice]

    return get


def is_trained(choice: str, name: str, expert: int | None) -> bool:
    chosen = CHOICES[choice]
    of_part = (
        {
            "all": True,
            "experts": is_expert(name),
            "router": ".mlp.gate." in name,
        }[chosen["trainable"]]
        if isinstance(chosen["trainable"], str)
        else any(w in name for w in ("q_proj", "k_proj", "lm_head"))
    )
    return of_part and (expert is None or expert in chosen.get("experts", range(4)))


def check_changes(choice: str, weights: dict, start: dict) -> None:
    """Each expert that is trained, and each other tensor that is, has changed; all else is what it was to the bit."""
    for name, (first, tensor) in weights.items():
        before = start[name][1]
        if first is None:
            assert torch.equal(tensor, before) != is_trained(choice, name, None), name
            continue
        for row, matrix in enumerate(tensor):
            assert torch.equal(matrix, before[first + row]) != is_trained(choice, name, first + row), (name, row)


@pytest.mark.parametrize("choice", CHOICES)
def test_one_process(choice, alone, start):
    found = alone(choice)
    check_changes(choice, found["weights"], start)
    assert min(found["norms"]) > 0.0
    for name, (_, gradient) in found["exp_avg"].items():
        for expert, moment in enumerate(gradient) if is_expert(name) else ():
            assert bool(moment.any()) == is_trained(choice, name, expert)


# the experts alone are looked at in test_origin.py, in every stage
LAYOUTS = [
    ("router", 1),
    ("router", 3),
    ("attention", 2),
    ("some_experts", 1),
    ("some_experts", 2),
    ("some_experts", 3),
    ("experts_of_one_rank", 2),
]


@pytest.mark.parametrize(("choice", "stage"), LAYOUTS)
def test_expert_parallel_ranks_equal_one_process(two_ranks, choice, stage, alone, start):
    recompute = {"activation_checkpointing": choice != "attention"}
    train = {"max_steps": 100, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32", "device": "cpu"}
    found = two_ranks.run(train_steps, run(2, choice, stage=stage, train=train | recompute), STEPS)
    expected = alone(choice)
    for per_rank in found:
        check_changes(choice, per_rank["weights"], start)
        assert per_rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert per_rank["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    worst, where = difference(found, expected, "weights")
    assert worst < 1e-4, where


@pytest.mark.parametrize(
    ("choice", "before", "after"),
    [
        ("experts", (2, 1), (1, 1)),
        ("some_experts", (1, 1), (2, 1)),
        ("some_experts", (2, 3), (1, 1)),
    ],
)
def test_resumed_at_another_layout_equals_uninterrupted(two_ranks, tmp_path, choice, before, after, start):
    """(ranks, ZeRO stage), with as many expert-parallel ranks: losses and weights, moments, and what is frozen."""

    def train(layout: tuple[int, int], **how) -> list[dict]:
        cfg = run(layout[0], choice, ep=layout[0], stage=layout[1])
        return two_ranks.run(_train, cfg, how) if layout[0] > 1 else [_train(cfg, how)]

    straight = train_steps(run(1, choice, ep=1), 2 * STEPS)
    first = train(before, save=str(tmp_path))
    second = train(after, source=first[0]["saved"], first=STEPS)
    assert first[0]["losses"] + second[0]["losses"] == pytest.approx(straight["losses"], rel=1e-5)
    for per_rank in second:
        check_changes(choice, per_rank["weights"], start)
    for kind, bound in (("weights", 1e-3), ("exp_avg", 1e-3)):
        worst, where = difference(second, straight, kind)
        assert worst < bound, (kind, where)


def _train(cfg, how: dict) -> dict:
    return train_steps(cfg, STEPS, **how)

"""A checkpoint names parameters, not ranks: written at any layout, it resumes at any other as if nothing had been."""

import itertools

import pytest
import torch
from support.ci import dear
from support.training import config, train_steps

ROWS, STEPS = 4, 3
# (ranks, expert-parallel size, ZeRO stage); one rank has neither
LAYOUTS = {
    "1": (1, 1, 1),
    **{f"{w}x{ep}z{z}": (w, ep, z) for w in (2, 4) for ep in (1, 2, 4) if ep <= w for z in (1, 2, 3)},
}
IN_CI = [
    ("1", "2x2z1"),
    ("2x2z3", "1"),
    ("2x2z2", "2x2z2"),
    ("4x4z1", "2x2z3"),
    ("2x1z3", "4x4z2"),
    ("4x2z3", "4x4z1"),
]


def steps(request, layout: str, **how) -> dict:
    """`train_steps` in a layout; of several ranks the first one's result."""
    world, ep, stage = LAYOUTS[layout]
    cfg = config(ROWS // world, 2, world, ep=ep, stage=stage, optimizer="adamw", **how.pop("sections", {}))
    if world == 1:
        return train_steps(cfg, STEPS, **how)
    return request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world]).run(_steps, cfg, how)[0]


def _steps(cfg, how: dict) -> dict:
    return train_steps(cfg, STEPS, **how)


@pytest.fixture(scope="module")
def uninterrupted():
    return train_steps(config(ROWS, 2, 1, optimizer="adamw"), 2 * STEPS)


def check(request, tmp_path, uninterrupted, before: str, after: str) -> float:
    first = steps(request, before, save=str(tmp_path))
    second = steps(request, after, source=first["saved"], first=STEPS)
    losses = first["losses"] + second["losses"]
    return max(abs(a - b) / abs(b) for a, b in zip(losses, uninterrupted["losses"], strict=True))


@pytest.mark.parametrize(("before", "after"), IN_CI)
def test_resumed_elsewhere_equals_uninterrupted(request, tmp_path, uninterrupted, before, after):
    assert check(request, tmp_path, uninterrupted, before, after) < 1e-5


@pytest.mark.grid
@pytest.mark.parametrize(("before", "after"), sorted(set(itertools.product(LAYOUTS, LAYOUTS)) - set(IN_CI)))
def test_every_pair_of_layouts(request, tmp_path, uninterrupted, before, after):
    assert check(request, tmp_path, uninterrupted, before, after) < 1e-5


def run_bf16(request, layout: str, dtype: str, steps_: int, **how) -> dict:
    world, ep, stage = LAYOUTS[layout]
    cfg = config(
        ROWS // world,
        2,
        world,
        ep=ep,
        stage=stage,
        optimizer="adamw",
        checkpoint={"dtype": dtype},
        train={
            "max_steps": 100,
            "micro_batch_size": ROWS // world,
            "global_batch_size": 2 * ROWS,
            "precision": "bf16",
            "device": "cpu",
        },
    )
    if world == 1:
        return train_steps(cfg, steps_, **how)
    return request.getfixturevalue("two_ranks").run(_bf16_steps, cfg, steps_, how)[0]


def _bf16_steps(cfg, steps_: int, how: dict) -> dict:
    return train_steps(cfg, steps_, **how)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    dear(
        [(layout, dtype) for layout in ("1", "2x2z1", "2x2z2", "2x2z3") for dtype in ("fp32", "bf16")],
        ("1", "fp32"),
        ("2x2z3", "bf16"),
    ),
)
def test_bf16_training_goes_on_from_its_fp32_masters(request, tmp_path, layout, dtype):
    straight = run_bf16(request, layout, dtype, 2 * STEPS)
    first = run_bf16(request, layout, dtype, STEPS, save=str(tmp_path))
    second = run_bf16(request, layout, dtype, STEPS, source=first["saved"], first=STEPS)
    assert first["losses"] + second["losses"] == straight["losses"]
    for name, (_, tensor) in straight["weights"].items():
        assert torch.equal(second["weights"][name][1], tensor), name
    assert any((t != t.bfloat16().float()).any() for _, t in first["weights"].values()), "masters are not fp32"


@pytest.mark.parametrize(
    ("before", "after"), dear([("1", "2x2z3"), ("2x2z1", "1"), ("2x2z2", "2x2z1")], ("2x2z1", "1"))
)
def test_bf16_masters_and_moments_move_between_layouts_bit_for_bit(request, tmp_path, before, after):
    first = run_bf16(request, before, "bf16", STEPS, save=str(tmp_path / "a"))
    moved = run_bf16(request, after, "bf16", 0, source=first["saved"], first=STEPS, save=str(tmp_path / "b"))
    back = run_bf16(request, before, "bf16", 0, source=moved["saved"], first=STEPS)
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for name, (_, tensor) in first[kind].items():
            assert torch.equal(back[kind][name][1], tensor), f"{kind} {name}"


@pytest.mark.parametrize("layout", dear(["2x2z1", "2x2z2", "2x2z3"], "2x2z2"))
def test_bf16_ranks_stay_close_to_one_process(request, layout):
    one = run_bf16(request, "1", "fp32", 10)
    several = run_bf16(request, layout, "fp32", 10)
    assert max(abs(a - b) for a, b in zip(one["losses"], several["losses"])) < 0.02

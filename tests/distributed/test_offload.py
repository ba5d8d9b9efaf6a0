"""Optimizer tensors in host memory: the same numbers, whole skipped steps, and checkpoints of any layout."""

from functools import partial

import pytest
import torch
from support.ci import dear
from support.training import config, difference, rows, train_steps

STEPS = 6
MICRO = 2
OFFLOAD = {"offload_optimizer": "cpu"}


@pytest.fixture(scope="module")
def expected() -> dict:
    return train_steps(config(MICRO * 2, 2, 1, optimizer="adamw"), STEPS)


def offloaded(stage: int, ep: int, **more):
    return config(MICRO, 2, 2, ep=ep, stage=stage, optimizer="adamw", parallel=OFFLOAD, **more)


@pytest.mark.parametrize(("stage", "ep"), dear([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)], (1, 2), (3, 2)))
def test_offload_changes_no_number(two_ranks, expected, stage, ep):
    found = two_ranks.run(train_steps, offloaded(stage, ep), STEPS)
    worst, where = difference(found, expected, "gradients")
    assert worst < 1e-5, where
    for per_rank in found:
        assert per_rank["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert per_rank["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        for norms, reference in zip(per_rank["expert_norms"], expected["expert_norms"], strict=True):
            assert norms == pytest.approx(reference, rel=1e-4)


@pytest.mark.grid
def test_offload_engages_deepspeed_in_one_process(expected):
    from support.ranks import Ranks

    alone = Ranks(1)  # a process of its own, since DeepSpeed leaves its group and accelerate's state behind
    try:
        [found] = alone.run(train_steps, config(MICRO * 2, 2, 1, optimizer="adamw", parallel=OFFLOAD), STEPS)
    finally:
        alone.close()
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)


@pytest.mark.parametrize("stage", dear([1, 2, 3], 2))
def test_bf16_is_the_same_with_and_without_offload(two_ranks, stage):
    precision = {"precision": "bf16"}
    kept = two_ranks.run(train_steps, config(MICRO, 2, 2, ep=2, stage=stage, optimizer="adamw", train=precision), STEPS)
    found = two_ranks.run(train_steps, offloaded(stage, 2, train=precision), STEPS)
    assert found[0]["losses"] == pytest.approx(kept[0]["losses"], rel=2e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_moves_between_offload_and_another_layout(two_ranks, expected, tmp_path, stage):
    half = STEPS // 2
    begun = two_ranks.run(partial(train_steps, save=str(tmp_path / "offloaded")), offloaded(stage, 2), half)[0]
    alone = config(MICRO * 2, 2, 1, optimizer="adamw")
    ended = train_steps(alone, half, source=begun["saved"], first=half)
    assert begun["losses"] + ended["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    saved = train_steps(alone, half, save=str(tmp_path / "alone"))["saved"]
    back = two_ranks.run(partial(train_steps, source=saved, first=half), offloaded(stage, 2), half)[0]
    assert back["losses"] == pytest.approx(expected["losses"][half:], rel=1e-4)


def step_discarded_between_two(cfg) -> tuple[float, list[float], list[float]]:
    """(gradient's square before a discarded step, weights' sums before and after it, norms of the steps around)."""
    from support.ranks import fresh_accelerate

    from moe_llm.data.packing import model_inputs
    from moe_llm.distributed.runtime import start
    from moe_llm.distributed.step_loss import StepLoss
    from moe_llm.train.build import build_trained

    fresh_accelerate()
    runtime = start(cfg)
    engine, _ = build_trained(cfg, runtime, None)

    def backward(step: int) -> None:
        batches = [rows(step, (j * 2 + runtime.rank) * MICRO, MICRO) for j in range(2)]
        step_loss = StepLoss(cfg.model, runtime, batches)
        for j, batch in enumerate(batches):
            engine.backward(step_loss(engine.forward(**model_inputs(batch))).total, last=j == 1)

    def sums() -> list[float]:
        return [
            engine.read(e.name, k).double().sum().item() for e in engine.entries() for k in ("weight", *engine.kinds)
        ]

    backward(0)
    norms = [engine.step(0.01)]
    backward(1)
    square = runtime.sum(engine.gradient_square().clone()).item()
    before = sums()
    engine.discard()
    after = sums()
    backward(1)
    norms.append(engine.step(0.01))
    return square, norms, [abs(a - b) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_discarded_step_changes_nothing_and_leaves_nothing_behind(two_ranks, stage):
    for square, norms, changes in two_ranks.run(step_discarded_between_two, offloaded(stage, 2)):
        assert square**0.5 == pytest.approx(norms[1], rel=1e-3), "the guard does not see the gradients"
        assert max(changes) == 0.0
    assert torch.isfinite(torch.tensor(norms)).all()

"""Gradients in bf16, and bf16 weights without fp32 masters: near the wide ones in every layout, and resumed in any."""

import itertools
from functools import partial

import pytest
import torch
from support.ci import dear
from support.training import config, train_steps

STEPS, MICRO, EXACT = 4, 2, 1e-12
KINDS = {
    "narrow gradients": {"parallel": {"gradient_dtype": "bf16"}},
    "kahan": {"parallel": {"gradient_dtype": "bf16"}, "optim": {"master_weights": "kahan"}},
    "stochastic": {"parallel": {"gradient_dtype": "bf16"}, "optim": {"master_weights": "stochastic_rounding"}},
}


def run(kind: str, ranks: int = 1, ep: int = 1, stage: int = 1, precision: str = "bf16"):
    more = KINDS.get(kind, {})
    return config(
        MICRO * 2 // ranks,
        2,
        ranks,
        optimizer="adamw",
        train={"precision": precision},
        optim={"name": "adamw", "lr": 1e-3, "schedule": "constant", "eps": 1e-6, **more.get("optim", {})},
        parallel={"expert_parallel_size": ep, "zero_stage": stage, **more.get("parallel", {})},
    )


@pytest.fixture(scope="module")
def wide() -> dict:
    return train_steps(run("wide"), STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_stays_near_fp32_masters(wide, kind):
    found = train_steps(run(kind), STEPS)
    assert found["losses"] == pytest.approx(wide["losses"], rel=2e-3)
    assert found["norms"] == pytest.approx(wide["norms"], rel=2e-2)


@pytest.mark.parametrize(
    ("kind", "ep", "stage"),
    dear(
        itertools.product(KINDS, (1, 2), (1, 2, 3)), *((kind, *layout) for kind in KINDS for layout in ((1, 2), (2, 3)))
    ),
)
def test_ranks_stay_near_fp32_masters(two_ranks, wide, kind, ep, stage):
    stays_near(two_ranks.run(train_steps, run(kind, 2, ep, stage), STEPS), wide)


def stays_near(ranks: list[dict], wide: dict) -> None:
    for found in ranks:
        assert found["losses"] == pytest.approx(wide["losses"], rel=3e-3)
        assert found["norms"] == pytest.approx(wide["norms"], rel=3e-2)


@pytest.mark.grid
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_stay_near_fp32_masters(four_ranks, wide, kind, ep, stage):
    stays_near(four_ranks.run(train_steps, run(kind, 4, ep, stage), STEPS), wide)


@pytest.mark.parametrize(
    ("kind", "stage"),
    dear([(k, s) for k in ("kahan", "stochastic") for s in (1, 2, 3)], ("kahan", 2), ("stochastic", 3)),
)
def test_a_resumed_run_equals_one_that_was_never_stopped_and_moves_to_one_process(two_ranks, tmp_path, kind, stage):
    spread = run(kind, 2, 2, stage)
    through = two_ranks.run(train_steps, spread, STEPS)
    begun = two_ranks.run(partial(train_steps, save=str(tmp_path / "half")), spread, STEPS // 2)[0]
    ended = two_ranks.run(partial(train_steps, source=begun["saved"], first=STEPS // 2), spread, STEPS // 2)
    for one, other in zip(through, ended, strict=True):
        assert one["losses"][STEPS // 2 :] == pytest.approx(other["losses"], rel=EXACT)
        for name, held in one["weights"].items():
            assert _equal(held, other["weights"][name]), name
    alone = train_steps(run(kind), STEPS // 2, source=begun["saved"], first=STEPS // 2)
    assert alone["losses"] == pytest.approx(through[0]["losses"][STEPS // 2 :], rel=3e-3)


def _equal(one, other) -> bool:
    return torch.equal(*(held[1] if isinstance(held, tuple) else held for held in (one, other)))


@pytest.mark.parametrize("kind", ["kahan", "stochastic"])
def test_one_process_moves_to_ranks(two_ranks, wide, tmp_path, kind):
    saved = train_steps(run(kind), STEPS // 2, save=str(tmp_path / "alone"))["saved"]
    back = two_ranks.run(partial(train_steps, source=saved, first=STEPS // 2), run(kind, 2, 2, 2), STEPS // 2)[0]
    assert back["losses"] == pytest.approx(wide["losses"][STEPS // 2 :], rel=3e-3)


def held_bytes(cfg) -> tuple[set[torch.dtype], bool, set[torch.dtype]]:
    """(dtypes of what the optimizer steps on, whether that is the model's own storage, dtypes of the gradients' sums)."""
    from support.ranks import fresh_accelerate

    from moe_llm.distributed import deepspeed as contract
    from moe_llm.distributed.runtime import start
    from moe_llm.train.build import build_trained

    fresh_accelerate()
    runtime = start(cfg)
    engine, _ = build_trained(cfg, runtime, None)
    optimizer = engine.engine.optimizer
    stepped = contract.flat_parameters(optimizer)
    storages = {getattr(p, "ds_tensor", p).untyped_storage().data_ptr() for p in engine.model.parameters()}
    own = all(t.untyped_storage().data_ptr() in storages for t in stepped if t.numel())
    return {t.dtype for t in stepped}, own, {optimizer.gradient_accumulation_dtype}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_rank_holds_fp32_weights_or_a_second_copy(two_ranks, stage):
    for kind in ("kahan", "stochastic"):
        for stepped, own, sums in two_ranks.run(held_bytes, run(kind, 2, 2, stage)):
            assert stepped == {torch.bfloat16} == sums
            assert own, "the optimizer steps on a copy"

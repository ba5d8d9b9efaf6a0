"""In bf16 a token that goes to another expert is no fault, and what follows from it is none either."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from support import runs

from moe_llm.config import load_config
from moe_llm.doctor.compare import gradients, tolerances, widened


def seen(*steps):
    """An observation of one layer with these tokens per expert, step by step."""
    return SimpleNamespace(records=[{"moe": {"tokens_per_expert": [counts]}} for counts in steps])


def allowed(precision, *more):
    return tolerances(load_config(runs.ROOT / "configs/quickstart.yaml", [f"train.precision={precision}", *more]))


def test_only_the_gates_of_em_have_more_room_and_of_no_other_router():
    slope = {name: np.ones(8, np.float32) for name in ("model.layers.0.mlp.gate.weight", "model.norm.weight")}
    off = {name: value * (1 + 2e-5) for name, value in slope.items()}
    for router, failing in (("em", ["model.norm.weight"]), ("reinforce", list(slope)), ("mixtral", list(slope))):
        found = gradients(off, slope, allowed("fp32", f"model.router.type={router}"), "gradients", "")
        assert found.evidence["beyond"] == failing


def test_in_fp32_nothing_is_given_room_for():
    fixed = allowed("fp32")
    assert widened(fixed, [seen([40, 60])], seen([50, 50])) is fixed


def test_in_bf16_the_room_is_what_the_moved_tokens_can_change():
    fixed = allowed("bf16")
    still = widened(fixed, [seen([50, 50])], seen([50, 50]))
    assert (still.gradient, still.weights) == (fixed.gradient, fixed.weights)
    moved = widened(fixed, [seen([49, 51], [40, 60])], seen([50, 50], [50, 50]))
    assert moved.gradient == pytest.approx(math.hypot(fixed.gradient, 2 * math.sqrt(2 * 0.01)))  # the first step's
    assert fixed.weights < moved.weights < 1  # the worst step's
    assert (moved.loss, moved.norm, moved.routing) == (fixed.loss, fixed.norm, fixed.routing)

"""The comparison with transformers refuses what differs."""

import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import step

    yield step
    for name in ("step", "contenders"):
        sys.modules.pop(name)


def tiny(step, **changes):
    defaults = {"batch": 2, "length": 32, "hidden": 32, "width": 24, "layers": 2, "heads": 4, "vocabulary": 97}
    return step.Shape(**{**defaults, **changes})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ours_is_admitted_and_a_different_model_is_not(step, dtype):
    shape = tiny(step)
    state = step.weights(shape)
    ids = step.batches(shape, 1)[0]
    names = ["ours", "transformers:eager", "transformers:grouped_mm"]
    models, failures = step.build_all(names, shape, state, step.DTYPES[dtype], ids)
    assert not failures
    wrong = step.contender("ours", shape, state, step.DTYPES[dtype])
    with torch.no_grad():
        wrong.model.model.layers[1].mlp.experts.down_proj[3] *= 1.5
    models["wrong"] = wrong
    found = step.departures(models, shape, state, ids, dtype)
    assert found["ours"] <= 1
    assert found["transformers:grouped_mm"] <= 1
    assert found["wrong"] > 1


def test_skew_gives_one_expert_its_share_of_the_tokens(step):
    for share in (0.0, 0.6):
        shape = tiny(step, batch=8, share=share, vocabulary=1000)
        counts = step.contender("ours", shape, step.weights(shape), torch.float32).counts(step.batches(shape, 1)[0])
        busiest = [layer[0] / shape.tokens for layer in counts]
        if share:
            assert busiest == pytest.approx([share] * len(busiest), abs=0.08)
        assert all(sum(layer) == shape.tokens * shape.top_k for layer in counts)

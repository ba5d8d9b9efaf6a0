"""The comparison with transformers refuses what differs."""

import sys
from pathlib import Path

import pytest
import torch
from support.ranks import Ranks

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


@pytest.fixture(scope="module")
def process():
    """DeepSpeed's layer needs a process group, which this process is to stay without."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_computes_the_same_is_admitted_and_a_different_model_is_not(process, dtype):
    ((failures, found),) = process.run(_departures, dtype)
    assert not failures
    assert found["ours"] <= 1
    assert found["deepspeed"] <= 1
    assert found["transformers:grouped_mm"] <= 1
    assert found["wrong"] > 1


def _departures(dtype: str) -> tuple[dict, dict]:
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    import step

    shape = tiny(step)
    state = step.weights(shape)
    ids = step.batches(shape, 1)[0]
    names = ["ours", "deepspeed", "transformers:eager", "transformers:grouped_mm"]
    models, failures = step.build_all(names, shape, state, step.DTYPES[dtype], ids)
    wrong = step.contender("ours", shape, state, step.DTYPES[dtype])
    with torch.no_grad():
        wrong.model.model.layers[1].mlp.experts.down_proj[3] *= 1.5
    return failures, step.departures({**models, "wrong": wrong}, shape, state, ids, dtype)


def test_skew_gives_one_expert_its_share_of_the_tokens(step):
    for share in (0.0, 0.6):
        shape = tiny(step, batch=8, share=share, vocabulary=1000)
        counts = step.contender("ours", shape, step.weights(shape), torch.float32).counts(step.batches(shape, 1)[0])
        busiest = [layer[0] / shape.tokens for layer in counts]
        if share:
            assert busiest == pytest.approx([share] * len(busiest), abs=0.08)
        assert all(sum(layer) == shape.tokens * shape.top_k for layer in counts)

"""Ranks under expert parallelism and ZeRO learn from teachers what one process learns."""

import pytest
from support.distillation import learn
from support.training import difference

from moe_llm.config import load_config


@pytest.fixture
def alone(student, mixtures, dense):
    """The configuration, and what one process makes of it: micro-batches of the ranks together."""
    distill = {
        "teachers": [{"path": str(mixtures[0])}, {"path": str(dense), "weight": 0.5}],
        "temperature": 2.0,
        "alpha": 0.75,
    }
    path = student(
        "run",
        distill,
        optim={"name": "sgd", "lr": 0.3, "schedule": "constant"},
        train={"max_steps": 2, "micro_batch_size": 2, "global_batch_size": 8},
    )
    return path, learn(load_config(path))


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (1, []),
        (3, ["train.activation_checkpointing=true"]),
        (2, ["distill.cache_top_k=320"]),
    ],
)
def test_two_ranks_equal_one_process(stage, words, two_ranks, alone):
    """With accumulation; the ranks' cache of all tokens is what the teachers say."""
    path, expected = alone
    layout = ["train.micro_batch_size=1", "parallel.expert_parallel_size=2", f"parallel.zero_stage={stage}", *words]
    found = two_ranks.run(learn, load_config(path, layout))
    for per_rank in found:
        for ours, theirs in zip(per_rank["losses"], expected["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)
    for what in ("gradients", "weights"):
        worst, where = difference(found, expected, what)
        assert worst < 5e-5, (what, where)
    assert expected["losses"][0]["distill"] > 0.1

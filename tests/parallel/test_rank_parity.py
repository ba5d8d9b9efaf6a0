"""N ranks with expert parallelism compute what one process computes that takes their micro-batches together."""

import pytest
from support.training import config, difference, train_steps

STEPS = 20
MICRO = 3


def reference(world: int, rounds: int, optimizer: str, **more) -> dict:
    return train_steps(config(MICRO * world, rounds, 1, optimizer=optimizer, **more), STEPS)


@pytest.fixture(scope="module")
def references():
    cache: dict = {}

    def get(world: int, rounds: int, optimizer: str) -> dict:
        key = (world, rounds, optimizer)
        if key not in cache:
            cache[key] = reference(*key)
        return cache[key]

    return get


def largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_expert_parallel_ranks_equal_one_process(request, references, world, stage, rounds, optimizer):
    ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world])
    expected = references(world, rounds, optimizer)
    found = ranks.run(train_steps, config(MICRO, rounds, world, ep=2, stage=stage, optimizer=optimizer), STEPS)
    assert min(expected["norms"]) > 0.5, "the clip bound is never active, so nothing shows that it is right"

    worst, where = difference(found, expected, "gradients")
    assert worst < 1e-5, where
    tolerance = 1e-5 if optimizer == "sgd" else 1e-4
    for per_rank in found:
        assert largest(per_rank["losses"], expected["losses"]) < tolerance
        assert largest(per_rank["norms"][:1], expected["norms"][:1]) < 1e-5
        assert largest(per_rank["norms"], expected["norms"]) < (1e-5 if optimizer == "sgd" else 1e-3)
        assert largest(per_rank["aux"], expected["aux"]) < tolerance
    if optimizer == "sgd":
        worst, where = difference(found, expected, "weights")
        assert worst < 1e-5, where

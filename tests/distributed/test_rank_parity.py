"""N ranks with expert parallelism compute what one process computes that takes their micro-batches together."""

import itertools

import pytest
from support.ci import dear
from support.training import MODEL, config, difference, train_steps

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


def norm_of_expert(result: dict, layer: int, expert: int) -> float:
    """From the gradients themselves."""
    of_layer = [g for name, (_, g) in result["gradients"].items() if f"layers.{layer}.mlp.experts" in name]
    parts = [gradient_E[expert] for gradient_E in of_layer]
    assert len(parts) == 2
    return sum(float(part.double().square().sum()) for part in parts) ** 0.5


@pytest.mark.parametrize(
    ("world", "stage", "rounds", "optimizer"),
    dear(
        itertools.product((2, 4), (1, 2, 3), (1, 2), ("sgd", "adamw")),
        *[(2, 1, 1, "sgd"), (2, 2, 2, "adamw"), (2, 3, 2, "adamw")],
    ),
)
def test_expert_parallel_ranks_equal_one_process(request, references, world, stage, rounds, optimizer):
    ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world])
    expected = references(world, rounds, optimizer)
    found = ranks.run(train_steps, config(MICRO, rounds, world, ep=2, stage=stage, optimizer=optimizer), STEPS)
    assert min(expected["norms"]) > 0.5, "the clip bound is never active, so nothing shows that it is right"

    worst, where = difference(found, expected, "gradients")
    assert worst < 1e-5, where
    by_hand = [[norm_of_expert(expected, layer, expert) for expert in range(4)] for layer in range(2)]
    for norms in (expected["expert_norms"], *(per_rank["expert_norms"] for per_rank in found)):
        assert norms == [pytest.approx(layer, rel=1e-4) for layer in by_hand]
    tolerance = 1e-5 if optimizer == "sgd" else 1e-4
    for per_rank in found:
        assert largest(per_rank["losses"], expected["losses"]) < tolerance
        assert largest(per_rank["norms"][:1], expected["norms"][:1]) < 1e-5
        assert largest(per_rank["norms"], expected["norms"]) < (1e-5 if optimizer == "sgd" else 1e-3)
        assert largest(per_rank["aux"], expected["aux"]) < tolerance
    if optimizer == "sgd":
        worst, where = difference(found, expected, "weights")
        assert worst < 1e-5, where


FEATURES = {
    "sequence_scope": {"router_aux_loss_scope": "sequence"},
    "capacity_drop": {"router": {"capacity_factor": 0.8}},
    "capacity_next": {"router": {"capacity_factor": 0.8, "overflow": "next"}},
    "capacity_residual": {"router": {"capacity_factor": 0.8, "overflow": "residual"}},
    "tied": {"tie_word_embeddings": True},
    "top1": {"num_experts_per_tok": 1},
}


@pytest.mark.parametrize(
    ("feature", "stage"),
    dear(itertools.product(FEATURES, (1, 3)), *((feature, (1, 3)[i % 2]) for i, feature in enumerate(FEATURES))),
)
def test_features_do_not_depend_on_the_layout(two_ranks, feature, stage):
    model = {**MODEL, **FEATURES[feature]}
    expected = train_steps(config(MICRO * 2, 2, 1, model=model), 5)
    found = two_ranks.run(train_steps, config(MICRO, 2, 2, ep=2, stage=stage, model=model), 5)
    worst, where = difference(found, expected, "gradients")
    assert worst < 1e-5, where
    for per_rank in found:
        assert largest(per_rank["losses"], expected["losses"]) < 1e-5
        assert largest(per_rank["aux"], expected["aux"]) < 1e-5


@pytest.mark.parametrize(
    ("stage", "chunks", "kind"),
    dear(
        [(*layout, kind) for layout in [(1, 1), (2, 2), (3, 1), (3, 3)] for kind in ("full", "selective")],
        (1, 1, "selective"),
        (2, 2, "full"),
        (3, 3, "selective"),
    ),
)
def test_recomputation_and_exchange_in_parts_under_expert_parallelism(two_ranks, stage, chunks, kind):
    train = {"activation_checkpointing": kind}
    expected = train_steps(config(MICRO * 2, 1, 1), 5)
    cfg = config(MICRO, 1, 2, ep=2, stage=stage, train=train, parallel={"all_to_all_chunks": chunks})
    found = two_ranks.run(train_steps, cfg, 5)
    worst, where = difference(found, expected, "gradients")
    assert worst < 1e-5, where
    assert max(largest(per_rank["losses"], expected["losses"]) for per_rank in found) < 1e-5


def test_global_balance_over_accumulated_micro_batches_is_near_the_exact_one():
    """With several micro-batches a step the fractions are those seen so far; with one, the exact ones."""
    exact = train_steps(config(6, 1, 1), 10)
    accumulated = train_steps(config(1, 6, 1), 10)
    departure = max(abs(a - b) / b for a, b in zip(accumulated["aux"], exact["aux"], strict=True))
    assert 0 < departure < 0.1
    assert largest(accumulated["losses"], exact["losses"]) < 0.01


@pytest.mark.parametrize(("stage", "ep"), dear(itertools.product((1, 2, 3), (1, 2)), (1, 2), (3, 1)))
def test_norms_of_single_experts_in_bf16_are_those_of_the_gradients(two_ranks, stage, ep):
    cfg = config(MICRO, 2, 2, ep=ep, stage=stage, train={"precision": "bf16"})
    for per_rank in two_ranks.run(train_steps, cfg, 1):
        for layer in range(2):
            held = next(first for name, (first, _) in per_rank["gradients"].items() if f"layers.{layer}.mlp.ex" in name)
            experts = range(held, held + 4 // ep)
            by_hand = [norm_of_expert(per_rank, layer, row) for row in range(4 // ep)]
            assert [per_rank["expert_norms"][layer][e] for e in experts] == pytest.approx(by_hand, rel=1e-3)

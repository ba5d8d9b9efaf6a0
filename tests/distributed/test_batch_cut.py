"""With `model.balance_over: step` the cut of a batch into micro-batches, over ranks and experts changes nothing."""

import pytest
import torch
from support.ci import dear
from support.ranks import Ranks
from support.tilted import tilted
from support.training import MODEL, config, difference, train_steps
from test_router_layouts import ROUTER

from moe_llm.config.load import validate
from moe_llm.errors import UserError
from moe_llm.model.moe.routers import ROUTERS

GLOBAL, STEPS, TOLERANCE = 8, 20, 1e-5
# Relative to a tensor's largest value, which counts as this share of the model's largest where it is smaller. One tensor
# is: `noise_weight` of noisy_top_k starts at zero and learns here from the load loss alone, whose gradient nearly
# cancels; after 20 steps it is 1e-6 beside weights of 0.8, and two cuts of the batch are 1e-11 apart.
FLOOR = 1e-5


def run_of(
    kind: str,
    micro: int,
    world: int = 1,
    *,
    ep: int = 1,
    stage: int = 1,
    recompute: bool = False,
    held: int = 1,
    **model,
):
    """A run of 8 rows a step. The router's settings are those of the layouts' test."""
    settings = dict(ROUTER.get(kind, {}))
    of_model = ("num_experts_per_tok", "num_shared_experts", "shared_expert_gate")
    moved = {key: settings.pop(key) for key in of_model if key in settings}
    raw = config(
        micro,
        GLOBAL // (micro * world),
        world,
        ep=ep,
        stage=stage,
        train={
            "activation_checkpointing": recompute,
            "max_steps": 100,
            "micro_batch_size": micro,
            "global_batch_size": GLOBAL,
            "precision": "fp32",
            "device": "cpu",
        },
    ).model_dump(mode="json")
    if kind == "reinforce":
        # with the whole of it, gates are so near a tie after 17 steps that rounding decides whose turn it is
        settings["policy_coef"] = 0.1
    changed = {"router_aux_loss_coef": 0.05, "balance_over": "step", **moved, "router": {"type": kind, **settings}}
    return validate(
        {
            **raw,
            "model": {**raw["model"], **changed, **model},
            "train": {**raw["train"], "held_micro_batches": held},
        }
    )


def largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def assert_same(found: list[dict], expected: dict) -> None:
    for per_rank in found:
        assert largest(per_rank["losses"], expected["losses"]) < TOLERANCE
        if expected["aux"][0]:
            assert largest(per_rank["aux"], expected["aux"]) < TOLERANCE
    for what in ("gradients", "weights"):
        worst, where = difference(found, expected, what, floor=FLOOR * largest_of(expected[what]))
        assert worst < TOLERANCE, f"{what} of {where}"


def largest_of(tensors: dict[str, tuple]) -> float:
    return max(float(tensor.abs().max()) for _, tensor in tensors.values())


@pytest.fixture(autouse=True)
def _tilted():
    with tilted():
        yield


@pytest.mark.parametrize(
    ("micro", "recompute"),
    dear([(micro, again) for micro in (1, 2, 4) for again in (False, True)], (1, False), (2, True)),
)
def test_micro_batches_of_any_size_are_one_batch(micro, recompute):
    assert_same(
        [train_steps(run_of("mixtral", micro, recompute=recompute), STEPS)], train_steps(run_of("mixtral", 8), STEPS)
    )


@pytest.mark.parametrize("kind", ROUTERS)
def test_for_every_router(kind):
    steps = 5
    assert_same([train_steps(run_of(kind, 2), steps)], train_steps(run_of(kind, 8), steps))


@pytest.mark.parametrize(("held", "forward"), dear([(1, 15), (3, 13), (8, 8), (20, 8)], (3, 13), (20, 8)))
def test_activations_may_be_held_so_that_fewer_micro_batches_are_computed_twice(monkeypatch, held, forward):
    """Held or not, recomputation and noise of the router included, the step is the same."""
    from moe_llm.distributed.engine import LocalEngine

    calls, real = [], LocalEngine.forward
    monkeypatch.setattr(LocalEngine, "forward", lambda self, **inputs: calls.append(1) or real(self, **inputs))
    settings = {"recompute": True, "router_jitter_noise": 0.3}
    found = train_steps(run_of("mixtral", 1, held=held, **settings), 3)
    assert len(calls) == 3 * forward
    assert_same([found], train_steps(run_of("mixtral", 1, **settings), 3))


def on_ranks(layouts: list[tuple], steps: int) -> list[dict]:
    return [train_steps(run_of(kind, micro, world, **more), steps) for kind, micro, world, more in layouts]


TWO_RANKS = [
    (kind, micro, 2, {"ep": ep, "stage": stage, "recompute": recompute})
    for kind in ("mixtral", "noisy_top_k")
    for micro, ep, stage, recompute in ((1, 1, 1, False), (1, 2, 2, True), (2, 2, 3, False), (1, 2, 3, True))
]
TWO_RANKS += [("mixtral", 1, 2, {"ep": 2, "stage": stage, "held": 3, "recompute": stage == 2}) for stage in (1, 2)]


@pytest.mark.parametrize(
    ("layouts", "steps"), [(TWO_RANKS[3:4], 5), pytest.param(TWO_RANKS, STEPS, marks=pytest.mark.grid)]
)
def test_two_ranks_under_zero_stages_equal_one_batch_of_one_process(two_ranks: Ranks, layouts, steps):
    found = two_ranks.run(on_ranks, layouts, steps)
    whole = {kind: train_steps(run_of(kind, 8), steps) for kind in {kind for kind, *_ in layouts}}
    for i, (kind, *_) in enumerate(layouts):
        assert_same([per_rank[i] for per_rank in found], whole[kind])


@pytest.mark.grid
@pytest.mark.parametrize("kind", ROUTERS)
def test_the_grid_of_ranks_experts_and_micro_batches(request, kind):
    whole = train_steps(run_of(kind, 8), STEPS)
    for world, micros in ((1, (1, 2, 4)), (2, (1, 2, 4)), (4, (1, 2))):
        layouts = [
            (kind, micro, world, {"ep": ep, "recompute": recompute})
            for micro in micros
            for ep in ((1,) if world == 1 else (1, 2))
            for recompute in (False, True)
        ]
        if world == 1:
            found = [on_ranks(layouts, STEPS)]
        else:
            found = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world]).run(on_ranks, layouts, STEPS)
        for i in range(len(layouts)):
            assert_same([per_rank[i] for per_rank in found], whole)


def test_without_it_the_balance_loss_depends_on_the_cut_and_nothing_else_does():
    """What is promised of the default: with the balance loss off all agrees, with it on the fractions are a prefix."""
    one, cut = (train_steps(run_of("mixtral", micro, balance_over="micro_batches"), 1) for micro in (8, 1))
    assert 1e-5 < abs(one["aux"][0] - cut["aux"][0]) / one["aux"][0] < 0.1
    off = {"balance_over": "micro_batches", "router_aux_loss_coef": 0.0, "router": {"type": "mixtral"}}
    assert_same(
        [train_steps(run_of("mixtral", 1, **off), STEPS)],
        train_steps(run_of("mixtral", 8, **off), STEPS) | {"aux": [0.0] * STEPS},
    )


@pytest.mark.parametrize("over", ["step", "micro_batches"])
def test_one_micro_batch_a_step_is_exact_either_way(over):
    exact, found = (train_steps(run_of("mixtral", 8, balance_over=way), 2) for way in ("step", over))
    assert found["losses"] == exact["losses"]


def test_noise_is_drawn_once_and_counted_as_it_is_used():
    """The step's counts are those of the choices that are trained on, noise and perturbations included."""
    from moe_llm.distributed.step_loss import StepLoss

    seen = []
    real = StepLoss.__call__

    def watch(self, output):
        seen.append((self.routing.tokens_per_expert_E, output.routing.tokens_per_expert_E.detach()))
        return real(self, output)

    noisy = run_of("mixtral", 2, router_jitter_noise=0.5)
    noisy = validate(
        noisy.model_dump(mode="json")
        | {"train": noisy.train.model_dump(mode="json") | {"adversarial": {"epsilon": 0.5}}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLoss, "__call__", watch)
        train_steps(noisy, 1)
    assert len(seen) == 4
    assert torch.equal(sum(own for _, own in seen), seen[0][0])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"balance_over": "sequence", "router_aux_loss_scope": "global"},
            "contradicts model.router_aux_loss_scope=global",
        ),
        ({"balance_over": "micro_batches", "router_aux_loss_scope": "sequence"}, "contradicts"),
        ({"balance_over": "step", "router_aux_loss_scope": "transformers"}, "each micro-batch by itself"),
    ],
)
def test_contradictions_are_refused(model, words):
    with pytest.raises(UserError, match=words):
        config(1, 1, 1, model=MODEL | model)


@pytest.mark.parametrize(
    ("over", "stage", "words"),
    [("micro_batches", 1, "is for model.balance_over=step"), ("step", 3, "needs ZeRO stage 2")],
)
def test_held_micro_batches_where_they_would_do_nothing_or_cannot_be_are_refused(over, stage, words):
    with pytest.raises(UserError, match=words):
        run_of("mixtral", 1, 2, stage=stage, held=2, balance_over=over)


def test_by_sequence_either_key_says_the_other():
    by_scope = config(1, 1, 1, model=MODEL | {"router_aux_loss_scope": "sequence"}).model
    assert by_scope == config(1, 1, 1, model=MODEL | {"balance_over": "sequence"}).model
    assert (by_scope.balance_over, by_scope.router_aux_loss_scope) == ("sequence", "sequence")

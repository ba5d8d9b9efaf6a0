"""Every router under expert parallelism equals one process, and its checkpoints resume in either."""

import pytest
from support.ranks import Ranks
from support.tilted import tilted
from support.training import MODEL, config, difference, train_steps

from moe_llm.config.load import validate
from moe_llm.model.moe.routers import ROUTERS

MICRO, STEPS = 3, 4
_MODEL = {**MODEL, "router_aux_loss_coef": 0.03}
ROUTER = {
    "mixtral": {
        "capacity_factor": 0.8,
        "overflow": "next",
        "initial_capacity_factor": 2.0,
        "capacity_decay_steps": 3,
        "global_entropy_coef": 0.2,
    },
    "dense": {"num_experts_per_tok": 4},
    "noisy_top_k": {"noise": False},
    "gshard": {"capacity_factor": 0.8, "second_expert": "always", "entropy_bonus_coef": 0.1},
    "switch": {"num_experts_per_tok": 1},
    "batch_prioritised": {"capacity_factor": 0.7, "noise": False},
    "top_p": {"num_experts_per_tok": 4, "p": 0.5, "local_entropy_coef": 0.1},
    "hierarchical": {"groups": 2, "groups_per_token": 2},
    "balanced": {},
    "deepseek_moe": {
        "expert_balance_coef": 0.1,
        "device_balance_coef": 0.2,
        "device_groups": 2,
        "num_shared_experts": 2,
        "shared_expert_gate": True,
    },
    "bias_balanced": {"update_rate": 0.05, "loss_share": 0.5, "n_group": 2, "topk_group": 1, "num_shared_experts": 1},
    "multi_head": {"heads": 3, "capacity_factor": 0.9, "overflow": "next", "global_entropy_coef": 0.1},
    "soft_moe": {"slots_per_expert": 2, "segment_length": 4, "entropy_bonus_coef": 0.1},
    "tilted": {},
    "lory": {"num_experts_per_tok": 1, "segment_length": 5, "local_entropy_coef": 0.1},
    "expert_choice": {"capacity_factor": 0.8},
    "attention": {"heads": 2, "key_size": 4, "capacity_factor": 0.9},
    "transformer": {"width": 8, "heads": 2},
    "reinforce": {"sample": False, "load_coef": 0.3},
    "em": {"form": "hard"},
    "switch, queue": {"num_experts_per_tok": 1, "capacity_factor": 0.5, "overflow": "queue", "queue_depth": 0.4},
    "deepseek_moe, queue": {"capacity_factor": 0.5, "overflow": "queue", "queue_depth": 0.3},
    "attention, residual": {"heads": 2, "key_size": 4, "capacity_factor": 0.5, "overflow": "residual"},
}


def run_of(kind: str, world: int, stage: int = 1):
    settings = dict(ROUTER[kind])
    of_model = ("num_experts_per_tok", "num_shared_experts", "shared_expert_gate")
    model = {key: settings.pop(key) for key in of_model if key in settings}
    model = {**_MODEL, "num_experts_per_tok": 2, **model, "router": {"type": kind.partition(",")[0], **settings}}
    # zeros are a poor test of anything; ranks' own random numbers differ by design
    raw = config(2 * MICRO // world, 1, world, ep=world, stage=stage, model=_MODEL).model_dump(mode="json")
    return validate({**raw, "model": {**raw["model"], **model}})


def on_ranks(root: str) -> dict[str, dict]:
    """All routers in one go, on each rank."""
    with tilted():
        return {
            kind: train_steps(run_of(kind, 2, 3 if i % 2 else 1), STEPS, save=f"{root}/{kind}")
            for i, kind in enumerate(ROUTER)
        }


@pytest.fixture(scope="module")
def found(two_ranks: Ranks, tmp_path_factory) -> list[dict[str, dict]]:
    return two_ranks.run(on_ranks, str(tmp_path_factory.mktemp("routers")))


@pytest.fixture(autouse=True)
def _tilted():
    with tilted():
        yield


def test_every_router_is_here():
    assert {kind.partition(",")[0] for kind in ROUTER} == set(ROUTERS)


def largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ROUTER)
def test_two_ranks_equal_one_process_and_resume_in_it(found, kind):
    straight = train_steps(run_of(kind, 1), STEPS + 1)
    for per_rank in found:
        assert largest(per_rank[kind]["losses"], straight["losses"][:STEPS]) < 1e-5
        assert largest(per_rank[kind]["norms"], straight["norms"][:STEPS]) < 1e-4
    expected = train_steps(run_of(kind, 1), STEPS)
    for what, tolerance in (("gradients", 2e-5), ("weights", 1e-4)):  # weights that begin at zero are all rounding
        worst, where = difference([per_rank[kind] for per_rank in found], expected, what)
        assert worst < tolerance, f"{what} of {where}"
    resumed = train_steps(run_of(kind, 1), 1, source=found[0][kind]["saved"], first=STEPS)
    assert largest(resumed["losses"], straight["losses"][STEPS:]) < 1e-5

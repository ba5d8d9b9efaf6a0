"""The loss curve of every router, committed: whoever changes what one computes, sees it.

To write the file anew: PYTHONPATH=.:tests python tests/train/test_golden_routing.py
"""

import json
from pathlib import Path

import pytest

from moe_llm.model.moe.routers import ROUTERS

FILE = Path(__file__).with_name("golden_routing.json")
SETTINGS = {
    "mixtral": {"capacity_factor": 1.0, "overflow": "next", "warmup_steps": 2, "global_entropy_coef": 0.1},
    "dense": {},
    "noisy_top_k": {},
    "gshard": {"entropy_bonus_coef": 0.05},
    "switch": {},
    "batch_prioritised": {},
    "top_p": {"p": 0.5},
    "hierarchical": {"groups": 2},
    "balanced": {},
    "deepseek_moe": {"device_balance_coef": 0.1, "device_groups": 2},
    "bias_balanced": {"update_rate": 0.02},
    "soft_moe": {"slots_per_expert": 2, "segment_length": 4},
    "multi_head": {"heads": 2},
    "lory": {"segment_length": 4},
    "expert_choice": {},
    "attention": {"heads": 2, "key_size": 4},
    "transformer": {"width": 8, "heads": 2, "capacity_factor": 1.0},
    "reinforce": {"load_coef": 0.1},
    "em": {},
    "switch, queue": {"capacity_factor": 0.5, "overflow": "queue", "queue_depth": 0.3},
    "mixtral, residual": {"capacity_factor": 0.7, "overflow": "residual"},
}


def curve(case: str) -> list[float]:
    from support.training import MODEL, config, train_steps

    kind = case.partition(",")[0]
    top_k = {"dense": 4, "top_p": 4, "switch": 1, "lory": 1}.get(kind, 2)
    model = {**MODEL, "num_experts_per_tok": top_k, "router": {"type": kind, **SETTINGS[case]}}
    return train_steps(config(4, 2, 1, optimizer="adamw", model=model), 6)["losses"]


def test_every_router_has_one():
    assert set(json.loads(FILE.read_text())) == set(SETTINGS)
    assert {case.partition(",")[0] for case in SETTINGS} == set(ROUTERS)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_curve_is_the_committed_one(kind):
    assert curve(kind) == pytest.approx(json.loads(FILE.read_text())[kind], rel=2e-5)


if __name__ == "__main__":
    FILE.write_text(json.dumps({kind: curve(kind) for kind in SETTINGS}, indent=1) + "\n")

"""The training loop, rehearsed on GPUs without values: it waits as often as is written here, and ranks agree."""

from collections import Counter

import pytest
from support.rehearsed import cluster_config

from moe_llm.distributed.rehearsal import disagreements
from moe_llm.train.metrics import StepWindow
from moe_llm.train.rehearsal import rehearse_training

# of a step that is recorded, beyond what its layers wait for
BUDGET = 12


def waits_of_the_loop(rehearsed) -> Counter[str]:
    return Counter(f"{wait.what}, {wait.where}" for wait in rehearsed.waits if wait.phase == "loop")


@pytest.mark.parametrize(("ep", "stage"), [(1, 1), (8, 2), (8, 3)])
def test_a_step_of_the_loop_is_sound(ep, stage):
    rehearsed = rehearse_training(cluster_config(ep=ep, stage=stage, activation_checkpointing="full"), 8)
    assert not rehearsed.faults
    assert rehearsed.operations["forward"] > 0
    assert rehearsed.operations["backward"] > rehearsed.operations["forward"]
    assert set(rehearsed.operations) >= {"loop", "optimizer"}


def test_ranks_of_the_loop_agree_about_their_exchanges():
    of_ranks = [rehearse_training(cluster_config(layers=1), 8, rank=rank, skew=0.5) for rank in (0, 5)]
    assert not disagreements(of_ranks, (0, 5))


def test_micro_batches_add_no_wait_of_the_loop():
    one, three = (rehearse_training(cluster_config(layers=1), 8, micro_batches=n) for n in (1, 3))
    assert waits_of_the_loop(one) == waits_of_the_loop(three)
    assert len(waits_of_the_loop(one)) <= BUDGET, waits_of_the_loop(one)


def test_a_wait_planted_in_the_loop_is_found(monkeypatch):
    kept = StepWindow.add

    def look(self, losses):
        float(losses.total)
        kept(self, losses)

    sound = rehearse_training(cluster_config(layers=1), 8, micro_batches=2)
    monkeypatch.setattr(StepWindow, "add", look)
    planted = rehearse_training(cluster_config(layers=1), 8, micro_batches=2)
    assert waits_of_the_loop(planted).total() == waits_of_the_loop(sound).total() + 2

"""Each check fails when its fault is there, and the likely cause is the one that was planted."""

import os
from pathlib import Path

import doctor_faults as faults
import pytest
from support.ci import dear

from moe_llm.config import load_config
from moe_llm.doctor.examine import examine

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
NOISE, LIMIT = "model.router_jitter_noise=0.1", "model.router.capacity_factor=1"

# fault: the check that finds it, words of the cause, overrides
PLANTED = [
    (faults.experts_left_out_of_the_optimizer, "run", "experts are not in the optimizer", []),
    (faults.half_of_each_expert_left_out_of_the_optimizer, "run", "not in the optimizer", []),
    (faults.experts_never_stepped, "experts_train", "experts are not in the optimizer", []),
    (
        faults.expert_gradients_scaled_by_the_ranks,
        "gradients",
        "gradients of the experts are scaled by 2, the number of ranks",
        [],
    ),
    (faults.loss_scaled_twice, "gradients", "gradients of all parameters are scaled by 2", []),
    (faults.balance_loss_per_rank, "aux_loss", "not summed over the ranks", []),
    (faults.padding_counted, "reference_aux", "padding is counted", []),
    (faults.clip_norm_per_rank, "norm", "not taken over all ranks", []),
    (faults.one_ranks_experts_exported, "export", "experts of some ranks are missing", []),
    (faults.config_that_transformers_refuses, "export_load", "not what transformers reads", []),
    (faults.stale_data_position, "resume_one_data", "data position", []),
    (faults.ranks_read_the_same_blocks, "samples", "share out the blocks wrongly", []),
    (faults.documents_see_each_other, "reference_lm", "documents see each other", []),
    (faults.recomputation_with_other_noise, "noise_recomputed", "recomputation draws other noise", [NOISE]),
    (faults.noise_without_effect, "noise_acts", "never drawn", [NOISE]),
    (faults.capacity_beyond_a_sequence, "dropped", "capacity must not look beyond a sequence", [LIMIT]),
]
# What a fault may be seen by besides; all other checks must still pass, or nobody could tell faults apart.
FOLLOWING = {
    "experts_never_stepped": {"weights", "lm_loss", "aux_loss", "z_loss", "loss", "val_loss", "routing", "norm"},
    "expert_gradients_scaled_by_the_ranks": {"norm", "weights"},
    "loss_scaled_twice": {"norm", "weights"},
    "balance_loss_per_rank": {"z_loss", "loss", "routing", "gradients", "norm", "weights", "lm_loss", "val_loss"},
    "padding_counted": {"reference_z", "reference_gradients", "reference_norm"},
    "clip_norm_per_rank": {"weights", "val_loss", "lm_loss", "loss"},
    "one_ranks_experts_exported": {"resume_one_state", "resume_one_loss"},
    "stale_data_position": {"resume_one_loss", "resume_ranks_data", "resume_ranks_loss"},
    "capacity_beyond_a_sequence": {
        "cut",  # room shared by a micro-batch depends on which rows are in it
        "lm_loss",
        "aux_loss",
        "z_loss",
        "loss",
        "val_loss",
        "gradients",
        "norm",
        "weights",
        "routing",
        "resume_one_loss",
        "resume_ranks_loss",
    },
    "documents_see_each_other": {"reference_aux", "reference_z", "reference_gradients", "reference_norm"},
}


NAMES = [fault.__name__ for fault, *_ in PLANTED]
IN_CI = [  # one of each kind of check
    "experts_left_out_of_the_optimizer",
    "loss_scaled_twice",
    "balance_loss_per_rank",
    "one_ranks_experts_exported",
    "documents_see_each_other",
]


@pytest.mark.parametrize(
    ("fault", "key", "words", "overrides"),
    dear(PLANTED, *[planted for planted in PLANTED if planted[0].__name__ in IN_CI]),
    ids=NAMES,
)
def test_a_planted_fault_is_found_and_named(doctor_ranks, fault, key, words, overrides):
    config = load_config(QUICKSTART, ["parallel.expert_parallel_size=2", *overrides])
    report = examine(config, steps=2, plant=fault, processes=doctor_ranks)
    failed = {finding.key: finding for finding in report.findings if finding.failed}
    assert not report.passed
    assert key in failed
    assert words in failed[key].cause
    assert failed[key].where
    if fault.__name__ in FOLLOWING:
        assert failed.keys() - {key} <= FOLLOWING[fault.__name__]


def test_without_a_fault_all_checks_pass(doctor_ranks):
    config = load_config(QUICKSTART, ["parallel.expert_parallel_size=2", NOISE, LIMIT])
    report = examine(config, steps=2, processes=doctor_ranks)
    assert [finding for finding in report.findings if finding.failed] == []
    seen = {finding.key for finding in report.findings}
    assert {key for _, key, _, _ in PLANTED} - {"run", "export_load"} <= seen


def test_the_experts_alone_are_examined_as_they_are_trained(doctor_ranks):
    """Some of them even; and what keeps them from being trained, or changes the rest, is found."""
    chosen = ["parallel.expert_parallel_size=2", "finetune.trainable=experts", "finetune.experts=[1,6]"]
    report = examine(load_config(QUICKSTART, chosen), steps=2, processes=doctor_ranks)
    assert [finding for finding in report.findings if finding.failed] == []
    assert "frozen" in {finding.key for finding in report.findings}
    for fault, key, words in (
        (faults.experts_left_out_of_the_optimizer, "run", "experts are not in the optimizer"),
        (faults.other_experts_decay_too, "frozen", "is in the optimizer, or decays"),
    ):
        report = examine(load_config(QUICKSTART, chosen), steps=2, plant=fault, processes=doctor_ranks)
        failed = {finding.key: finding for finding in report.findings if finding.failed}
        assert words in failed[key].cause


def test_a_dead_rank_leaves_its_last_words(doctor_ranks):
    report = examine(load_config(QUICKSTART), steps=2, plant=faults.a_rank_dies, processes=doctor_ranks)
    (failed,) = [finding for finding in report.findings if finding.failed]
    assert (failed.key, failed.where) == ("run", "rank 1 ended with exit code 7")
    assert "a rank raised, ended or hung" in failed.cause
    assert "the end is near" in failed.evidence["trace"]


def test_a_fault_in_one_process_is_found_and_leaves_no_rank_at_work(doctor_ranks):
    report = examine(load_config(QUICKSTART), steps=2, plant=faults.one_process_raises, processes=doctor_ranks)
    (failed,) = [finding for finding in report.findings if finding.failed]
    assert (failed.key, failed.where) == ("run", "one process: RuntimeError: no step today")
    assert "in train_step" in failed.evidence["trace"]
    assert doctor_ranks.run(os.getpid), "the next examination finds ranks"

"""Faults of the package itself, which every layout shares: the oracle finds each and says what it is."""

from pathlib import Path

import doctor_faults as faults
import pytest

from moe_llm.config import load_config
from moe_llm.doctor.examine import examine

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
WEIGHTED = "data.sources=[{type: python_stdlib, weight: 3.0}, {type: python_stdlib, weight: 1.0}]"

# The seven of an audit that compared layouts alone missed. fault: the check that finds it, words of the cause.
AUDITED = [
    (faults.no_weight_decay, "oracle_updates", "weight decay is not applied"),
    (faults.norms_decay_and_matrices_do_not, "oracle_updates", "applied to vectors (norms) in place of matrices"),
    (faults.rate_rises_threefold, "oracle_schedule", "not its formula's"),
    (faults.betas_swapped, "oracle_moments", "the two betas are swapped"),
    (faults.clipping_ignored, "oracle_moments", "gradients are not clipped"),
    (faults.labels_are_the_inputs, "oracle_text", "targets are not the next tokens"),
    (faults.every_sample_is_the_same_block, "oracle_order", "blocks are read again before all have been read"),
]
OTHERS = [
    (faults.norms_decay_too, "oracle_updates", "applied to vectors (norms) too", []),
    (
        faults.rate_is_multiplied_on_its_way_to_the_optimizer,
        "oracle_updates",
        "the learning rate is multiplied by 3",
        [],
    ),
    (faults.warm_up_is_a_step_late, "oracle_schedule", "not its formula's", []),
    (faults.eps_is_large, "oracle_updates", "its groups, rate, decay, betas, eps or bound", []),
    (faults.decay_is_added_to_the_gradient, "oracle_updates", "not decoupled", []),
    (faults.borders_of_documents_are_a_token_late, "oracle_text", "border", []),
    (faults.positions_go_on_over_documents, "oracle_text", "positions do not count from 0", []),
    (faults.first_tokens_are_targets, "oracle_text", "the last target of a document's piece", []),
    (faults.padding_has_targets, "oracle_text", "padding has targets", []),
    (faults.every_other_target_is_lost, "oracle_text", "targets are not the next tokens", []),
    (faults.epochs_have_one_order, "oracle_order", "all epochs have the order", []),
    (faults.the_seed_is_ignored, "oracle_order", "another run.seed gives the same order", []),
    (faults.samples_are_drawn_with_replacement, "oracle_order", "blocks are read again", []),
    (faults.weights_of_sources_are_ignored, "oracle_order", "its weight asks for", [WEIGHTED]),
    (faults.documents_begin_without_bos, "oracle_text", "does not begin with", []),
    (faults.documents_end_without_eos, "oracle_text", "border", []),
]


def failures(doctor_ranks, fault, overrides=()):
    config = load_config(QUICKSTART, ["parallel.expert_parallel_size=2", *overrides])
    report = examine(config, steps=2, plant=fault, processes=doctor_ranks)
    return {finding.key: finding for finding in report.findings if finding.failed}


@pytest.mark.parametrize(("fault", "key", "words"), AUDITED, ids=[f[0].__name__ for f in AUDITED])
def test_a_fault_that_all_layouts_share_is_found_and_named(doctor_ranks, fault, key, words):
    failed = failures(doctor_ranks, fault)
    assert key in failed
    assert words in failed[key].cause


@pytest.mark.grid
@pytest.mark.parametrize(("fault", "key", "words", "overrides"), OTHERS, ids=[f[0].__name__ for f in OTHERS])
def test_more_faults_that_all_layouts_share_are_found_and_named(doctor_ranks, fault, key, words, overrides):
    failed = failures(doctor_ranks, fault, overrides)
    assert key in failed
    assert words in failed[key].cause

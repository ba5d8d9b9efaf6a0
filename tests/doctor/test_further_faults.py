"""More faults that every layout shares, of the optimizer, the losses, the first weights, noise, evaluation and resuming."""

from pathlib import Path

import further_faults as faults
import pytest

from moe_llm.config import load_config
from moe_llm.doctor.examine import examine

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
ACCUMULATED, NOISE, DROPOUT = "train.global_batch_size=64", "model.router_jitter_noise=0.1", "model.expert_dropout=0.1"
LORA = "finetune.lora={rank: 8, alpha: 16, targets: [attention, experts]}"

# fault: the check that finds it, words of the cause, overrides, steps
FAULTS = [
    (faults.bias_correction_is_left_out, "oracle_updates", "optimizer's step", [], 2),
    (faults.the_floor_of_the_cosine_is_lost, "oracle_schedule", "not its formula's", [], 2),
    (faults.gradients_are_clipped_value_by_value, "oracle_norm", "not that of all gradients", [], 2),
    (faults.the_last_micro_batch_is_dropped, "reference_gradients", "micro-batch 2 of 2 counts 0", [ACCUMULATED], 2),
    (faults.the_balance_losss_coefficient_counts_twice, "reference_gradients", "balance loss counts 2.00 times", [], 2),
    (faults.the_z_loss_is_recorded_and_not_trained, "reference_gradients", "z-loss counts 0.00 times", [], 2),
    (faults.experts_are_stored_in_another_order, "export", "in another's place", [], 2),
    (
        faults.scaling_of_rope_lost_on_export,
        "export_config",
        "rope_type is 'default'",
        ["model.rope_parameters={rope_type: linear, factor: 4.0}"],
        2,
    ),
    (faults.documents_begin_a_token_late_in_the_mask, "reference_lm", "documents see each other", [], 2),
    (
        faults.a_tied_embedding_learns_from_its_output_alone,
        "reference_gradients",
        "embed_tokens.weight alone depart",
        ["model.tie_word_embeddings=true"],
        2,
    ),
    (faults.the_average_has_another_decay, "oracle_average", "average", ["checkpoint.ema.decay=0.9"], 4),
    (faults.a_frozen_router_moves, "frozen", "in the optimizer", ["finetune.trainable=experts"], 2),
    (faults.an_expert_gets_no_gradient, "reference_gradients", "of the experts alone", [], 2),
    (faults.the_last_block_of_an_epoch_is_never_read, "oracle_text", "never targets", [], 2),
    (faults.held_out_losses_are_averaged_over_batches, "val_loss", "held-out", [], 4),
    (faults.dropout_acts_while_evaluating, "noise_val", "while evaluating", [DROPOUT], 2),
    (faults.schedules_begin_again_with_a_resumed_run, "resume_one_loss", "schedule", [], 4),
    (faults.moments_begin_again_with_a_resumed_run, "resume_one_state", "misses or misplaces", [], 2),
    (faults.initial_weights_are_three_times_as_large, "oracle_initial", "deviates by", [], 2),
    (faults.every_layer_begins_with_the_same_weights, "oracle_initial", "begins with the weights of", [], 2),
    (faults.every_expert_begins_with_the_same_weights, "oracle_initial", "begins with the weights of", [], 2),
    (faults.all_ranks_draw_the_same_noise, "random", "draws the random numbers of rank 0, step 1", [NOISE], 2),
    (faults.noise_is_the_same_in_each_step, "random", "draws the random numbers of rank 0, step 1", [NOISE], 2),
    (faults.masters_are_rounded_to_bf16, "oracle_updates", "optimizer's step", [], 2),
    (faults.adapters_of_experts_count_twice_as_much, "reference_lm", "forward pass", [LORA, "optim.lr=0.02"], 2),
]


@pytest.mark.grid
@pytest.mark.parametrize(("fault", "key", "words", "overrides", "steps"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_further_faults_are_found_and_named(doctor_ranks, fault, key, words, overrides, steps):
    config = load_config(QUICKSTART, ["parallel.expert_parallel_size=2", *overrides])
    report = examine(config, steps=steps, plant=fault, processes=doctor_ranks)
    failed = {finding.key: finding for finding in report.findings if finding.failed}
    assert key in failed, failed
    assert words in failed[key].cause


@pytest.mark.grid
def test_dropout_passes_and_is_seen_to_act(doctor_ranks):
    report = examine(load_config(QUICKSTART, [DROPOUT]), steps=2, processes=doctor_ranks)
    assert [finding for finding in report.findings if finding.failed] == []
    assert {"noise_dropout", "noise_val", "reference_val"} <= {finding.key for finding in report.findings}

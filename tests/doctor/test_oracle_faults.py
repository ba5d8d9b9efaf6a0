"""Faults of the package itself, which every layout shares: the oracle finds each and says what it is."""

import argparse
import inspect
import json
import os
import textwrap
from pathlib import Path

import doctor_faults as faults
import practice_faults as practice
import pytest
from support.ci import dear

from moe_llm.config import load_config
from moe_llm.doctor.examine import examine
from moe_llm.doctor.ranks import no_plant

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
_LIBRARY = Path(json.__file__).parents[1]
WEIGHTED = (
    f"data.sources=[{{type: files, path: '{_LIBRARY}/json/*.py', weight: 3.0}}, "
    f"{{type: files, path: '{_LIBRARY}/email/*.py', weight: 1.0}}]"
)

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
LORA = "finetune.lora={rank: 8, alpha: 16, targets: [attention, experts]}"
CHAT = "data.sources=[{{type: files, path: {conversations}, content: chat}}]"
PRACTICE = [
    (practice.rope_base_lost_on_export, "export_config", "has the base", ["model.rope_theta=500"]),
    (practice.window_lost_on_export, "export_config", "sliding_window is None", ["model.sliding_window=64"]),
    (practice.eos_is_another_token_in_the_model, "export_tokens", "eos_token_id is", []),
    (practice.dtype_of_the_checkpoint_is_misnamed, "export_config", "dtype is 'float16'", []),
    (practice.checkpoint_is_stored_in_another_dtype, "export_dtype", "is stored as BF16, not F32", []),
    (practice.adapters_are_merged_twice, "export", "does not hold what was trained", [LORA, "optim.lr=0.02"]),
    (practice.the_average_lags_a_step, "oracle_average", "lags behind the weights", ["checkpoint.ema.decay=0.9"]),
    (
        practice.loss_is_averaged_over_micro_batches,
        "cut",
        "averaged over micro-batches in place of tokens",
        ["train.global_batch_size=64"],
    ),
    (practice.experts_in_no_group_of_any_layout, "run", "not in the optimizer", []),
    (practice.norms_in_no_group_of_any_layout, "run", "not in the optimizer", []),
    (practice.a_frozen_part_moves, "weights", "optimizer's step is not", ["finetune.trainable=experts"]),
    (practice.balance_loss_without_the_number_of_experts, "reference_aux", "another formula than in the paper", []),
    (practice.z_loss_without_its_square, "reference_z", "another formula", []),
    (practice.weights_of_experts_do_not_sum_to_one, "reference_lm", "forward pass", []),
    (practice.rope_has_another_base, "reference_lm", "forward pass", ["model.rope_theta=500"]),
    (practice.window_is_a_token_too_long, "reference_lm", "forward pass", ["model.sliding_window=64"]),
    (practice.norms_have_another_epsilon, "reference_lm", "forward pass", []),
    (practice.the_end_of_the_turn_is_not_learned, "oracle_chat", "ends the assistant's turn is not learned", [CHAT]),
    (practice.the_question_is_learned_too, "oracle_chat", "what the user says is learned", [CHAT]),
    (practice.the_end_of_the_turn_is_cut_off, "oracle_chat", "", [CHAT]),
    (practice.checkpoints_are_loaded_in_another_dtype, "resume_one_state", "is loaded in bfloat16", []),
]
ENDLESS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
NOISY = "model.router.type=noisy_top_k"
GROUPS = "model.router={type: deepseek_moe, device_balance_coef: 0.1, device_groups: 2}"
ENTROPY = "model.router={type: top_p, local_entropy_coef: 0.1}"
GATE = ["model.num_shared_experts=1", "model.shared_expert_gate=true"]
BIASED = "model.router.type=bias_balanced"
ROUTERS_AND_FAMILIES = [
    (practice.biases_move_the_wrong_way, "reference_buffers", "by another rule than its paper's", [BIASED]),
    (practice.a_variation_is_not_squared, "reference_own", "another formula", [NOISY]),
    (practice.groups_of_experts_are_summed_in_place_of_averaged, "reference_own", "another formula", [GROUPS]),
    (practice.entropy_has_another_base, "reference_own", "another formula", [ENTROPY]),
    (practice.norms_of_heads_are_left_out, "reference_lm", "forward pass", ["model.qk_norm=head"]),
    (practice.gates_of_shared_experts_stay_open, "reference_lm", "forward pass", GATE),
]


@pytest.mark.grid
@pytest.mark.parametrize(("fault", "key", "words", "overrides"), PRACTICE, ids=[f[0].__name__ for f in PRACTICE])
def test_what_goes_wrong_in_practice_is_found_and_named(doctor_ranks, conversations, fault, key, words, overrides):
    failed = failures(
        doctor_ranks, fault, [o.format(conversations=conversations) if o == CHAT else o for o in overrides]
    )
    assert key in failed, failed
    assert words in failed[key].cause


@pytest.mark.grid
@pytest.mark.parametrize(
    ("fault", "key", "words", "overrides"), ROUTERS_AND_FAMILIES, ids=[f[0].__name__ for f in ROUTERS_AND_FAMILIES]
)
def test_faults_of_routers_losses_and_of_families_are_found_and_named(doctor_ranks, fault, key, words, overrides):
    failed = failures(doctor_ranks, fault, overrides)
    assert key in failed, failed
    assert words in failed[key].cause


@pytest.mark.grid
def test_a_template_that_writes_no_end_of_the_turn_is_found(doctor_ranks, conversations, tmp_path):
    (tmp_path / "endless.jinja").write_text(ENDLESS)
    chosen = [CHAT.format(conversations=conversations), f"data.chat_template={tmp_path}/endless.jinja"]
    failed = failures(doctor_ranks, no_plant, chosen)
    assert set(failed) == {"oracle_chat"}
    assert "writes nothing after the assistant's turn" in failed["oracle_chat"].cause


SOUND = {
    "Qwen2-MoE": [*GATE, "model.attention_bias=qkv"],
    "Qwen3-MoE": ["model.qk_norm=head"],
    "OLMoE": ["model.qk_norm=projection"],
    "noisy top-k, accumulation": [NOISY, "train.global_batch_size=64"],
    "balanced devices": [GROUPS],
    "as many experts as a token needs": [ENTROPY],
    "as shipped": [],
    "low-rank adapters": [LORA, "optim.lr=0.02"],
    "an average of the weights": ["checkpoint.ema.decay=0.9"],
    "chat": [CHAT],
    "weighted sources": [WEIGHTED],
    "an exact balance loss, accumulation": ["model.balance_over=step", "train.global_batch_size=64"],
    "rates by part": ["optim.lr_multipliers={experts: 0.5, router: 0.1}", "optim.schedule=wsd"],
    "Muon": ["optim.name=muon"],
    "Lion": ["optim.name=lion", "optim.lr=0.0001"],
    "schedule-free AdamW": ["optim.name=schedule_free", "optim.schedule=constant"],
    "bf16 on disk": ["checkpoint.dtype=bf16", "train.precision=bf16"],
}


@pytest.mark.grid
@pytest.mark.parametrize("overrides", SOUND.values(), ids=SOUND)
def test_what_is_sound_passes(doctor_ranks, conversations, overrides):
    chosen = [o.format(conversations=conversations) if o == CHAT else o for o in overrides]
    assert failures(doctor_ranks, no_plant, chosen) == {}


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """Rows of chat from the standard library's own documentation."""
    path, rows = tmp_path_factory.mktemp("chat") / "rows.jsonl", []
    for module in (json, os, textwrap, argparse):
        for name, value in vars(module).items():
            told = inspect.getdoc(value) if callable(value) else None
            if told:
                rows.append({"prompt": f"What does {module.__name__}.{name} do?", "completion": told})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def failures(doctor_ranks, fault, overrides=()):
    config = load_config(QUICKSTART, ["parallel.expert_parallel_size=2", *overrides])
    report = examine(config, steps=2, plant=fault, processes=doctor_ranks)
    return {finding.key: finding for finding in report.findings if finding.failed}


@pytest.mark.parametrize(
    ("fault", "key", "words"), dear(AUDITED, *AUDITED[:1], *AUDITED[-2:]), ids=[f[0].__name__ for f in AUDITED]
)
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

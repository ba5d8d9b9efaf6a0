"""Sizes go down, features stay."""

from pathlib import Path

import pytest

from moe_llm.config import load_config
from moe_llm.doctor.shrink import one_process, shrink

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"))
QUICKSTART = next(path for path in CONFIGS if path.stem == "quickstart")
FEATURES = {
    "model": [
        "num_local_experts",
        "num_experts_per_tok",
        "router",
        "router_aux_loss_coef",
        "router_aux_loss_scope",
        "router_z_loss_coef",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
    ],
    "data": ["isolate_documents"],
    "optim": ["name", "lr", "betas", "eps", "weight_decay", "grad_clip", "schedule"],
    "train": ["precision", "activation_checkpointing"],
    "parallel": ["zero_stage", "engine"],
    "checkpoint": ["dtype"],
    "run": ["seed"],
}


def small(*overrides: str, ranks: int = 2, steps: int = 4):
    return shrink(load_config(QUICKSTART, overrides), ranks, steps)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("ranks", [2, 4])
def test_shipped_configurations_keep_their_features_and_get_small(path, ranks):
    config = load_config(path)
    made = shrink(config, ranks, 4).config
    for section, names in FEATURES.items():
        for name in names:
            assert getattr(getattr(made, section), name) == getattr(getattr(config, section), name), name
    assert made.model.num_attention_heads // made.model.kv_heads == (
        config.model.num_attention_heads // config.model.kv_heads
    )
    assert made.model.model_copy(update={"vocab_size": 512}).num_params() < 2_000_000
    assert made.max_steps == 4
    assert ranks % made.parallel.expert_parallel_size == 0
    assert made.accumulation_steps(ranks) >= 1


@pytest.mark.parametrize(("micro", "whole", "rounds"), [(16, 16, 1), (1, 4, 2), (1, 64, 2), (4, 8, 1)])
def test_a_run_that_accumulates_still_does(micro, whole, rounds):
    made = small(f"train.micro_batch_size={micro}", f"train.global_batch_size={whole}").config
    assert made.accumulation_steps(2) == rounds


@pytest.mark.parametrize(("window", "expected"), [("null", None), (64, 10), (4, 2), (255, 20), (300, 40)])
def test_a_window_bites_where_the_users_does(window, expected):
    made = small(f"model.sliding_window={window}", "model.max_position_embeddings=1024").config
    assert made.model.sliding_window == expected


@pytest.mark.parametrize(
    ("heads", "kv", "head_dim", "hidden"), [(8, 2, "null", 256), (32, 1, "null", 256), (6, 3, 32, 100), (2, 2, 6, 30)]
)
def test_heads_keep_their_groups_and_width_its_relation_to_them(heads, kv, head_dim, hidden):
    config = load_config(
        QUICKSTART,
        [
            f"model.num_attention_heads={heads}",
            f"model.num_key_value_heads={kv}",
            f"model.head_dim={head_dim}",
            f"model.hidden_size={hidden}",
        ],
    )
    model = shrink(config, 2, 4).config.model
    assert model.num_attention_heads // model.kv_heads == heads // kv
    square = config.model.attention_head_dim * heads == hidden
    assert (model.attention_head_dim * model.num_attention_heads == model.hidden_size) == square


def test_expert_parallelism_is_what_the_ranks_allow_and_says_so():
    made = small("parallel.expert_parallel_size=8")
    assert made.config.parallel.expert_parallel_size == 2
    assert any("expert_parallel_size=8 is 2 here" in note for note in made.notes)
    assert small("parallel.expert_parallel_size=8", ranks=4).config.parallel.expert_parallel_size == 4
    assert small().config.parallel.expert_parallel_size == 1
    assert small().notes == []


def test_a_huge_number_of_experts_is_cut_and_still_divides():
    made = small("model.num_local_experts=384", "parallel.expert_parallel_size=4", ranks=4)
    assert made.config.model.num_local_experts == 64
    assert made.config.parallel.expert_parallel_size == 4
    assert any("num_local_experts=384 is 64 here" in note for note in made.notes)


def test_one_process_takes_the_ranks_micro_batches_together():
    made = small("train.micro_batch_size=1", "train.global_batch_size=8", ranks=4).config
    alone = one_process(made, 4)
    assert alone.accumulation_steps(1) == made.accumulation_steps(4)
    assert alone.train.global_batch_size == made.train.global_batch_size


def test_a_balance_loss_per_rank_is_compared_micro_batch_by_micro_batch():
    made = small("model.router_aux_loss_scope=transformers")
    alone = one_process(made.config, 2)
    assert alone.accumulation_steps(1) == 2 * made.config.accumulation_steps(2)


def test_a_step_that_is_not_finite_is_not_left_out():
    assert small("train.on_nan=skip").config.train.on_nan == "stop"


def test_noise_is_off_between_layouts_and_says_so():
    made = small("model.router_jitter_noise=0.1")
    assert made.config.model.router_jitter_noise == 0
    assert any("router_jitter_noise=0.1 is off" in note for note in made.notes)


@pytest.mark.parametrize(
    ("experts", "top_k", "router"),
    [
        (8, 2, {"slots_per_expert": 16, "segment_length": 64}),
        (128, 2, {"slots_per_expert": 2, "segment_length": 128}),
        (8, 1, {"slots_per_expert": 1, "segment_length": 9}),
    ],
)
def test_slots_are_formed_in_short_blocks_and_of_fewer_experts(experts, top_k, router):
    settings = f"{{type: soft_moe, slots_per_expert: {router['slots_per_expert']}, "
    settings += f"segment_length: {router['segment_length']}}}"
    made = small(f"model.num_local_experts={experts}", f"model.num_experts_per_tok={top_k}", f"model.router={settings}")
    assert made.config.model.router.segment_length * 4 < made.config.data.sequence_length
    assert made.config.model.num_local_experts == min(experts, 64)
    if experts == 8:
        assert made.config.model.num_experts_per_tok == top_k


@pytest.mark.parametrize("heads", [2, 3, 16])
def test_parts_of_tokens_stay_whole(heads):
    model = small(f"model.router={{type: multi_head, heads: {heads}}}").config.model
    assert (model.router.heads, model.hidden_size % heads) == (heads, 0)


def test_blocks_have_several_segments():
    lory = ["model.router={type: lory, segment_length: 64}", "model.num_experts_per_tok=1"]
    made = small(*lory).config
    assert made.model.router.segment_length == made.data.sequence_length // 4


@pytest.mark.parametrize(
    ("router", "experts", "more", "expected"),
    [
        ("{type: hierarchical, groups: 12, groups_per_token: 2}", 96, [], 72),
        ("{type: hierarchical, groups: 12, groups_per_token: 2}", 96, ["parallel.expert_parallel_size=4"], 72),
        ("{type: bias_balanced, n_group: 5, topk_group: 2}", 160, [], 65),
        ("{type: bias_balanced, n_group: 5, topk_group: 2}", 160, ["parallel.expert_parallel_size=4"], 80),
        ("{type: bias_balanced, n_group: 100, topk_group: 2}", 200, [], 200),  # groups of two are the smallest
        (
            "{type: deepseek_moe, device_groups: 3, device_balance_coef: 1}",
            192,
            ["parallel.expert_parallel_size=4"],
            72,
        ),
        ("{type: dense}", 96, ["model.num_experts_per_tok=96"], 96),
        ("{type: expert_choice, capacity_factor: 35}", 96, [], 70),
        ("{type: mixtral}", 96, [], 64),
    ],
)
def test_fewer_experts_still_fit_the_router(router, experts, more, expected):
    made = small(f"model.router={router}", f"model.num_local_experts={experts}", *more, ranks=4)
    assert made.config.model.num_local_experts == expected
    assert (
        made.config.model.router
        == load_config(QUICKSTART, [f"model.router={router}", f"model.num_local_experts={experts}", *more]).model.router
    )
    assert expected == experts or any(f"is {expected} here" in note for note in made.notes)


def test_turns_are_seen_in_few_steps():
    made = small("train.adversarial={epsilon: 0.1, router_every: 50}").config
    assert made.train.adversarial.router_every == 2
    assert made.train.adversarial.epsilon == 0.1


def test_a_run_on_pairs_of_answers_is_one_on_their_texts(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    source = f"{{type: files, content: preference, path: {tmp_path}/pairs.jsonl}}"
    found = small(
        f"data.sources=[{source}]",
        f"data.validation_sources=[{source}]",
        "data.overlong=truncate",
        f"model.init_from={tmp_path}",
        "preference.loss=ipo",
        "optim.name=adamw_8bit",
    )
    assert not found.config.data.has_preference
    assert found.config.optim.name == "adamw_8bit"
    assert len(found.config.data.validation_sources) == 1
    assert any("preference.loss=ipo is left out here" in sentence for sentence in found.notes)

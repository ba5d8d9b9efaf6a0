"""The oracle's second opinion of a model, and the package's own: the same losses and gradients for every router and family."""

import model_faults as faults
import numpy as np
import pytest
import torch

from moe_llm.config import ModelConfig
from moe_llm.config.routers import ROUTER_SETTINGS
from moe_llm.data.packing import Batch
from moe_llm.doctor.oracle.family import comparable, decoder_of, has_own_layers
from moe_llm.doctor.oracle.transformer import Reference
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.moe.router import end_step

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.05,
}
ROUTERS = {
    **{kind: {"router": {"type": kind}} for kind in ("mixtral", "balanced", "attention", "em", "expert_choice")},
    "noisy_top_k": {"router": {"type": "noisy_top_k", "noise": False}},
    "gshard": {"router": {"type": "gshard", "second_expert": "always", "capacity_factor": None}},
    "switch": {"router": {"type": "switch", "capacity_factor": None}, "num_experts_per_tok": 1},
    "batch_prioritised": {"router": {"type": "batch_prioritised", "noise": False, "capacity_factor": None}},
    "top_p": {"router": {"type": "top_p", "p": 0.6, "local_entropy_coef": 0.2}, "num_experts_per_tok": 4},
    "dense": {"router": {"type": "dense"}, "num_experts_per_tok": 6},
    "hierarchical": {
        "router": {"type": "hierarchical", "groups": 3, "groups_per_token": 2, "entropy_bonus_coef": 0.1},
        "num_experts_per_tok": 4,
    },
    "deepseek_moe": {"router": {"type": "deepseek_moe", "n_group": 3, "topk_group": 2}, "num_shared_experts": 1},
    "bias_balanced": {"router": {"type": "bias_balanced", "n_group": 3, "topk_group": 2, "update_rate": 0.1}},
    "bias_balanced, softmax": {"router": {"type": "bias_balanced", "score": "softmax", "norm_topk_prob": False}},
    "bias_balanced by losses": {"router": {"type": "bias_balanced", "loss_share": 0.4, "update_rate": 0.1}},
    "soft_moe": {
        "router": {"type": "soft_moe", "slots_per_expert": 1, "segment_length": 4},
        "num_experts_per_tok": 2,
    },
    "soft_moe, as they are": {
        "router": {"type": "soft_moe", "slots_per_expert": 2, "segment_length": 4, "normalize": False},
        "num_experts_per_tok": 3,
    },
    "multi_head": {"router": {"type": "multi_head", "heads": 3}},
    "lory": {"router": {"type": "lory", "segment_length": 4}, "num_experts_per_tok": 1},
    "transformer": {"router": {"type": "transformer", "width": 8, "heads": 2, "window": 5}},
    "reinforce": {"router": {"type": "reinforce", "sample": False, "load_coef": 0.3}},
    "reinforce, means before": {"router": {"type": "reinforce", "sample": False, "baseline": "leave_one_out"}},
    "em, hard": {"router": {"type": "em", "form": "hard", "expert_coef": 0.7}},
}
LATENT = {
    "kv_lora_rank": 6,
    "num_key_value_heads": 2,
    "head_dim": None,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
OSS = {"attention_bias": "all", "attention_sinks": True, "sliding_window": 3, "rope_theta": 100.0}
SHARED = {"num_shared_experts": 2}
SIGMOID = {"router": {"type": "bias_balanced", "routed_scaling_factor": 1.5, "update_rate": 0.1}}
FAMILIES = {
    "qwen2_moe": {**SHARED, "shared_expert_gate": True, "attention_bias": "qkv", "mlp_only_layers": [0]},
    "qwen2_moe without shared experts": {"attention_bias": "qkv"},
    "qwen2_moe, some windows": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {"qk_norm": "head", "mlp_only_layers": [0], "dense_intermediate_size": 14},
    "qwen3_moe with shared experts": {"qk_norm": "head", "attention_bias": "all", **SHARED},
    "olmoe": {"qk_norm": "projection", "head_dim": 12},
    "glm4_moe": {
        **SIGMOID,
        **SHARED,
        "qk_norm": "head",
        "attention_bias": "qkv",
        "mlp_only_layers": [0],
        "rope_parameters": {"partial_rotary_factor": 0.5},
    },
    "glm4_moe's attention": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "deepseek_v2": {
        **LATENT,
        "router": {"type": "deepseek_moe", "routed_scaling_factor": 1.4},
        **SHARED,
        "mlp_only_layers": [0],
        "q_lora_rank": 5,
    },
    "deepseek_v2, groups": {
        **LATENT,
        "router": {"type": "deepseek_moe", "n_group": 3, "topk_group": 2, "expert_balance_coef": 0.3},
        **SHARED,
    },
    "deepseek_v3": {
        **LATENT,
        "router": {"type": "bias_balanced", "n_group": 3, "topk_group": 2},
        **SHARED,
        "mlp_only_layers": [0],
    },
    "deepseek_v3's attention": {**LATENT, "router": {"type": "hierarchical", "groups": 3}},
    "gpt_oss": {
        **OSS,
        "expert_bias": True,
        "swiglu_limit": 0.5,
        "layer_types": ["sliding_attention", "full_attention"],
        "router": {"type": "mixtral", "bias": True},
    },
    "gpt_oss's attention": {**OSS, "router": {"type": "multi_head", "heads": 2}, "mlp_only_layers": [0]},
    "experts with biases": {"expert_bias": True, "mlp_only_layers": [0], "tie_word_embeddings": True},
    "llama's attention": {"attention_bias": "all"},
}
NATIVE = ("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v2, groups", "deepseek_v3", "gpt_oss")


def batch(seed: int, isolated: bool = True) -> Batch:
    """Two rows of documents of uneven lengths, the second row with padding."""
    drawn = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(0, SIZES["vocab_size"], (2, 21), generator=drawn)
    lengths = [[9, 5, 7], [12, 6]]
    document_BS = torch.full((2, 21), -1)
    position_BS, label_BS = torch.zeros(2, 21, dtype=torch.int64), torch.full((2, 21), -100)
    mask_BS = torch.zeros(2, 21, dtype=torch.bool)
    for row, parts in enumerate(lengths):
        at = 0
        for number, length in enumerate(parts):
            document_BS[row, at : at + length] = number
            position_BS[row, at : at + length] = torch.arange(length)
            label_BS[row, at : at + length - 1] = ids_BS[row, at + 1 : at + length]
            at += length
        mask_BS[row, :at] = True
        if not isolated:
            position_BS[row] = torch.arange(21)
    return Batch(ids_BS, label_BS, position_BS, document_BS if isolated else None, mask_BS)


def both(changes, isolated=True, steps=2):
    """(ours, the oracle's) losses by name and gradients, of so many steps with the same weights but for the buffers."""
    config = ModelConfig.model_validate({**SIZES, **changes})
    torch.manual_seed(0)
    model = MoEDecoder(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.train()
    reference = Reference(config)
    for step in range(steps):
        one = batch(step, isolated)
        weights = {n: t.detach().numpy().copy() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        expected = reference.step(weights, [one])
        model.zero_grad()
        found = model(
            one.input_ids_BS,
            one.attention_mask_BS,
            targets=one.labels_BS,
            position_ids=one.position_ids_BS,
            document_ids=one.document_ids_BS,
        )
        found.loss.backward()
        end_step(model, type(found.routing)(*(part.detach() for part in found.routing)))
        yield model, found, expected


BY_DOCUMENT = ("balanced", "expert_choice", "soft_moe", "lory", "transformer", "reinforce, means before")


@pytest.mark.parametrize("changes", [*ROUTERS.values(), *FAMILIES.values()], ids=[*ROUTERS, *FAMILIES])
def test_losses_gradients_and_buffers_are_those_of_the_second_opinion(changes):
    agree(changes, isolated=True)


@pytest.mark.parametrize("kind", BY_DOCUMENT)
def test_they_are_where_documents_are_not_isolated(kind):
    agree(ROUTERS[kind], isolated=False)


def agree(changes, isolated):
    for model, found, expected in both(changes, isolated):
        lm = float(found.loss_sum.detach() / found.num_targets)
        np.testing.assert_allclose(lm, expected.lm, rtol=1e-5)
        np.testing.assert_allclose(float(found.aux_loss.detach()), expected.aux, rtol=1e-5)
        np.testing.assert_allclose(float(found.z_loss.detach()), expected.z, rtol=1e-5)
        total = expected.lm + model.config.router_aux_loss_coef * expected.aux
        total += model.config.router_z_loss_coef * expected.z
        total += sum(loss.coefficient * expected.own[loss.name] for loss in model.router_losses)
        np.testing.assert_allclose(float(found.loss.detach()), total, rtol=1e-5)
        named = dict(model.named_parameters())
        assert named.keys() == expected.gradients.keys()
        for name, parameter in named.items():
            due = torch.from_numpy(expected.gradients[name])
            mine = torch.zeros_like(due) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(
                mine, due, rtol=1e-5, atol=1e-5 * max(1e-2, float(due.abs().max())), msg=lambda m, n=name: f"{n}: {m}"
            )
        for name, buffer in model.named_buffers():
            np.testing.assert_allclose(buffer.numpy(), expected.buffers[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_there_is_a_second_opinion_of_every_router_and_family():
    assert {changes["router"]["type"] for changes in ROUTERS.values()} == set(ROUTER_SETTINGS)
    for name, changes in FAMILIES.items():
        config = ModelConfig.model_validate({**SIZES, **changes})
        assert comparable(config)
        assert decoder_of(config) == name.split("'")[0].split(",")[0].split(" ")[0] or "'" in name or "biases" in name
        assert has_own_layers(config) == (name in NATIVE), name


PLANTED = [
    (faults.biases_move_towards_the_load, ROUTERS["bias_balanced"]),
    (faults.a_group_is_as_good_as_its_best_expert, ROUTERS["bias_balanced"]),
    (faults.thresholds_are_sums_in_place_of_means, ROUTERS["expert_choice"]),
    (faults.experts_take_a_token_less, ROUTERS["expert_choice"]),
    (faults.positions_count_over_documents, ROUTERS["balanced"]),
    (faults.gates_read_other_documents, ROUTERS["transformer"]),
    (faults.segments_go_over_documents, ROUTERS["soft_moe"]),
    (faults.the_first_segment_is_routed_like_a_later_one, ROUTERS["lory"]),
    (faults.what_is_drawn_is_put_back, ROUTERS["reinforce"]),
    (faults.the_baseline_looks_at_the_token_itself, ROUTERS["reinforce, means before"]),
    (faults.the_posterior_knows_no_likelihood, ROUTERS["em"]),
    (faults.parts_are_merged_in_another_order, ROUTERS["multi_head"]),
    (faults.shared_experts_count_twice, FAMILIES["deepseek_v3"]),
    (faults.activations_are_not_clamped, FAMILIES["gpt_oss"]),
    (faults.sinks_take_nothing, FAMILIES["gpt_oss"]),
    (faults.scores_of_latent_heads_have_the_width_of_a_value, FAMILIES["deepseek_v2"]),
    (faults.whole_heads_are_turned, FAMILIES["glm4_moe"]),
]


@pytest.mark.parametrize(("fault", "changes"), PLANTED, ids=[f[0].__name__ for f in PLANTED])
def test_a_fault_of_a_router_or_of_a_decoders_part_makes_them_disagree(fault, changes):
    with fault(), pytest.raises(AssertionError):
        agree(changes, isolated=True)

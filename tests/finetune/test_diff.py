"""The difference of two checkpoints, whatever their layouts."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training import MODEL

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.config import ModelConfig
from moe_llm.finetune import diff as module
from moe_llm.finetune.diff import compare, diff
from moe_llm.model.init import init_weights

CONFIG = ModelConfig(**MODEL)


@pytest.fixture
def model():
    model = MoEForCausalLM(CONFIG)
    init_weights(model, 1)
    return model


def restacked(directory) -> None:
    """Rewrite a checkpoint with stacked experts under `mlp`, as transformers 5 has them in memory."""
    model = MoEForCausalLM.from_pretrained(directory)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, directory / "model.safetensors")


@pytest.mark.parametrize("stacked", [False, True])
def test_changes_by_part_layer_and_expert(model, tmp_path, stacked, capsys):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model.save_pretrained(base)
    experts = model.model.layers[1].mlp.experts
    before = torch.cat([experts.gate_up_proj[2].flatten(), experts.down_proj[2].flatten()]).double()
    with torch.no_grad():
        experts.gate_up_proj[2].add_(0.5)
    model.save_pretrained(tuned, max_shard_size="20KB")
    if stacked:
        restacked(base)
    rows = {(r["part"], r["layer"], r["expert"]): r for r in diff(base, tuned, layers=True, experts=True)}
    changed = rows.pop(("experts", 1, 2))
    norm = 0.5 * math.sqrt(experts.gate_up_proj[2].numel())
    assert changed["change"] == pytest.approx(norm, rel=1e-6)
    assert changed["base_norm"] == pytest.approx(before.norm().item(), rel=1e-9)
    assert changed["relative"] == pytest.approx(norm / before.norm().item(), rel=1e-6)
    assert (changed["matrices"], changed["same_bytes"], changed["same_values"]) == (2, 1, 1)
    assert all(r["same_bytes"] == r["same_values"] == r["matrices"] and r["change"] == 0.0 for r in rows.values())
    assert len(rows) == 2 * (3 + 4) + 3 - 1  # per layer attention, router, norms and experts; three in no layer

    by_part = diff(base, tuned)
    assert [r["part"] for r in by_part] == [
        part for part in module.PARTS if part not in ("shared_experts", "dense_mlp")
    ]
    assert sum(r["elements"] for r in by_part) == CONFIG.num_params()
    assert main(["diff", str(base), str(tuned), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_part
    assert main(["diff", str(base), str(tuned), "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [heading in lines[1] for heading in ("layer", "same bytes", "change", "relative")] == [True] * 4
    assert sum("experts" in line for line in lines) == 2


def test_another_dtype_is_the_same_in_value_not_in_bytes(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path / "narrow")
    model.save_pretrained(tmp_path / "wide", dtype="fp32")
    for row in diff(tmp_path / "narrow", tmp_path / "wide"):
        assert (row["same_bytes"], row["same_values"], row["change"]) == (0, row["matrices"], 0.0)


def test_nothing_that_is_not_a_number_passes_for_the_same_value():
    nan = torch.tensor([float("nan"), 1.0])
    assert (compare(nan, nan).same_bytes, compare(nan, nan.double()).same_values) == (1, 0)
    minus, plus = torch.tensor([-0.0]), torch.tensor([0.0])
    assert (compare(minus, plus).same_bytes, compare(minus, plus).same_values) == (0, 1)


def test_slices_do_not_matter(monkeypatch):
    a, b = torch.randn(7, 5), torch.randn(7, 5)
    whole = compare(a, b)
    monkeypatch.setattr(module, "_SLICE", 3)
    assert vars(compare(a, b)) == pytest.approx(vars(whole))
    assert whole.change_square == pytest.approx((b.double() - a.double()).square().sum().item())


def test_other_shapes_and_missing_tensors_are_named(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "base")
    other = MoEForCausalLM(CONFIG.model_copy(update={"num_local_experts": 2}))
    init_weights(other, 1)
    other.save_pretrained(tmp_path / "other")
    assert main(["diff", str(tmp_path / "base"), str(tmp_path / "other")]) == 2
    assert "model.layers.0.mlp.gate.weight is [4, 24] in" in capsys.readouterr().err
    assert main(["diff", str(tmp_path / "base"), str(tmp_path / "nowhere")]) == 2
    assert "nowhere' does not exist" in capsys.readouterr().err
    tensors = load_file(tmp_path / "base/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "base/model.safetensors")
    assert main(["diff", str(tmp_path / "base"), str(tmp_path / "base")]) == 2
    assert "missing model.norm.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    "router",
    [
        {"type": "bias_balanced"},
        {"type": "expert_choice"},
        {"type": "noisy_top_k"},
        {"type": "multi_head", "heads": 2},
    ],
    ids=lambda router: router["type"],
)
def test_what_routers_have_beside_weights_is_compared_too(tmp_path, router):
    config = ModelConfig(**{**MODEL, "router": router})
    for name, moved in (("base", False), ("tuned", True)):
        model = MoEForCausalLM(config)
        init_weights(model, 1)
        with torch.no_grad():
            for _, tensor in [*model.named_buffers(), *model.named_parameters()]:
                if moved and any(
                    tensor is part
                    for layer in model.model.layers
                    for part in (*layer.mlp.gate.buffers(), *layer.mlp.gate.parameters())
                ):
                    tensor += 1
        model.save_pretrained(tmp_path / name)
    same = {row["part"]: row["same_bytes"] == row["matrices"] for row in diff(tmp_path / "base", tmp_path / "tuned")}
    assert [part for part, is_same in same.items() if not is_same] == ["router"]
    assert all(row["change"] == 0 for row in diff(tmp_path / "base", tmp_path / "base"))
    buffers = len(list(model.model.layers[0].mlp.gate.buffers()))
    parameters = len(list(model.model.layers[0].mlp.gate.parameters()))
    [routers] = [row for row in diff(tmp_path / "base", tmp_path / "tuned") if row["part"] == "router"]
    assert routers["matrices"] == config.num_hidden_layers * (buffers + parameters)


@pytest.mark.parametrize("gate", [False, True])
def test_shared_experts_are_a_part_of_their_own(tmp_path, gate, capsys):
    config = ModelConfig(**{**MODEL, "num_shared_experts": 1, "shared_expert_gate": gate})
    model = MoEForCausalLM(config)
    init_weights(model, 1)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.shared_experts.down_proj.weight += 1
    model.save_pretrained(tmp_path / "tuned")
    rows = diff(tmp_path / "base", tmp_path / "tuned")
    assert [row["part"] for row in rows] == [part for part in module.PARTS if part != "dense_mlp"]
    assert sum(row["elements"] for row in rows) == config.num_params()
    assert [row["part"] for row in rows if row["change"]] == ["shared_experts"]
    assert main(["diff", str(tmp_path / "base"), str(tmp_path / "tuned"), "--layers"]) == 0
    assert "shared_experts" in capsys.readouterr().out

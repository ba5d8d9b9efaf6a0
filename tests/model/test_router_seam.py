"""A router that a test brings along: one short class, and it is configured, trained, saved, loaded and counted."""

import inspect

import pytest
import torch
from support.tilted import TiltedRouter, tilted
from support.training import config, train_steps

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import dump_config
from moe_llm.config.load import parse_yaml, validate
from moe_llm.config.routers import ROUTER_SETTINGS
from moe_llm.families.architectures import export_note
from moe_llm.families.hf import buffer_shapes, parameter_shapes
from moe_llm.finetune.selection import part_of
from moe_llm.model.init import build_model
from moe_llm.model.moe.router import routers_of
from moe_llm.model.moe.routers import ROUTERS

NEEDED = {
    "hierarchical": {"groups": 2},
    "soft_moe": {"slots_per_expert": 2, "segment_length": 4},
    "multi_head": {"heads": 2},
    "lory": {"segment_length": 4},
}
BF16 = {"train": {"precision": "bf16"}, "checkpoint": {"dtype": "bf16"}}


@pytest.fixture(autouse=True)
def _tilted():
    with tilted():
        yield


def run_of(**sections):
    raw = config(2, 2, 1).model_dump(mode="json")
    raw["model"]["router"] = {"type": "tilted"}
    return validate({name: {**values, **sections.get(name, {})} for name, values in raw.items()})


def test_the_class_is_short():
    assert len(inspect.getsource(TiltedRouter).splitlines()) <= 40


def test_its_settings_are_part_of_the_configuration():
    cfg = run_of(model={**config(2, 2, 1).model_dump(mode="json")["model"], "router": {"type": "tilted", "rate": 0.5}})
    assert cfg.model.router == TiltedRouter.Settings(rate=0.5)
    assert validate(parse_yaml(dump_config(cfg), "dump")) == cfg


def test_training_moves_the_buffer_and_feels_the_loss():
    found = train_steps(run_of(), 6)
    bias_E = found["weights"]["model.layers.0.mlp.gate.bias"][1]
    assert bias_E.abs().max() > 0.04
    assert not found["gradients"].keys() & buffer_shapes(run_of().model).keys()
    without = {"type": "tilted", "square_coef": 0.0}
    other = train_steps(run_of(model={**run_of().model.model_dump(mode="json"), "router": without}), 1)
    assert not torch.equal(*(r["gradients"]["model.layers.0.mlp.gate.weight"][1] for r in (found, other)))
    assert found["losses"][0] != other["losses"][0]


def test_a_frozen_router_keeps_its_buffer():
    found = train_steps(run_of(finetune={"trainable": "experts"}), 3)
    assert not found["weights"]["model.layers.0.mlp.gate.bias"][1].any()


@pytest.mark.parametrize("sections", [{}, BF16], ids=["fp32", "bf16"])
def test_saved_and_resumed_it_goes_on_as_if_nothing_had_been(tmp_path, sections):
    cfg = run_of(**{name: {**run_of().model_dump(mode="json")[name], **values} for name, values in sections.items()})
    straight, first = train_steps(cfg, 4), train_steps(cfg, 2, save=str(tmp_path))
    second = train_steps(cfg, 2, source=first["saved"], first=2)
    assert first["losses"] + second["losses"] == straight["losses"]
    for name, (_, tensor) in straight["weights"].items():
        assert torch.equal(second["weights"][name][1], tensor), name

    model = MoEForCausalLM.from_pretrained(first["saved"])
    bias_E = first["weights"]["model.layers.1.mlp.gate.bias"][1]
    assert bias_E.any()
    assert torch.equal(model.get_buffer("model.layers.1.mlp.gate.bias"), bias_E)
    assert model.lm_head.weight.dtype == (torch.bfloat16 if sections else torch.float32)
    model.save_pretrained(tmp_path / "again", dtype="bf16")
    again = MoEForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.get_buffer("model.layers.1.mlp.gate.bias"), bias_E)
    assert again.lm_head.weight.dtype == torch.bfloat16


def test_buffers_stay_fp32_wherever_the_model_goes():
    model = build_model(run_of().model, 0)
    model.model.layers[0].mlp.gate.bias.fill_(1 + 2**-20)
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.gate.bias.tolist() == [1 + 2**-20] * 4
    assert model.double().model.layers[0].mlp.gate.bias.dtype == torch.float32


@pytest.mark.parametrize("kind", [*ROUTERS, "tilted"])
def test_names_shapes_and_sizes_are_those_of_the_module(kind):
    model = run_of().model.model_dump(mode="json") | {"num_local_experts": 4}
    model |= {
        "num_experts_per_tok": {"switch": 1, "dense": 4, "lory": 1}.get(kind, 2),
        "router": {"type": kind, **NEEDED.get(kind, {})},
    }
    cfg = run_of(model=model)
    built = build_model(cfg.model, 0)
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == parameter_shapes(cfg.model)
    assert {name: tuple(b.shape) for name, b in built.named_buffers()} == buffer_shapes(cfg.model)
    assert cfg.model.num_params() == sum(p.numel() for p in built.parameters())
    assert len(routers_of(built)) == 2
    gates = [name for name in parameter_shapes(cfg.model) if part_of(name) == "router"]
    assert sum(built.get_parameter(name).numel() for name in gates) == cfg.model.parameter_counts()["router"]
    native = kind in ("mixtral", "dense", "gshard", "noisy_top_k", "em")
    note = export_note(cfg.model)
    assert (note is None) == (kind in ("mixtral", "dense", "gshard", "em"))
    assert native or f"model.router.type={kind}" in note
    assert kind in ROUTER_SETTINGS

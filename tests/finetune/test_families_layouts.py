"""Experts of every family fine-tuned over two ranks that hold half of them each: all else stays to the byte."""

import copy
from functools import partial

import pytest
import torch
from support.families import CASES
from support.training import MODEL, config, difference, train_steps
from transformers import AutoModelForCausalLM

from moe_llm.finetune.diff import diff
from moe_llm.finetune.init_from import complete

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 6}
FAMILIES = {
    "mixtral": "mixtral-yarn",
    "qwen2_moe": "qwen2-windows",
    "qwen3_moe": "qwen3-sparse-step",
    "olmoe": "olmoe-bias",
    "glm4_moe": "glm4",
    "deepseek_v2": "deepseek2-groups",
    "deepseek_v3": "deepseek3",
    "gpt_oss": "gpt-oss",
}
STAGES = {"gpt_oss": (1, 3), "glm4_moe": (3,), "deepseek_v2": (2,)}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    """The family and a directory that transformers saved."""
    theirs = copy.deepcopy(CASES[FAMILIES[request.param]])
    theirs.vocab_size = MODEL["vocab_size"]
    for key, number in EXPERTS.items():
        if key in theirs.to_dict() or key in theirs.attribute_map:
            setattr(theirs, key, number)
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(theirs).save_pretrained(directory)
    return request.param, directory


def run_of(directory, world: int, **more):
    raw = {"model": {"init_from": str(directory), "router_aux_loss_coef": 0.0}}
    complete(raw)
    return config(8 // world, 1, world, model=raw["model"], finetune={"trainable": "experts"}, **more)


def test_experts_alone_change_whatever_the_layout_and_the_class_stays(base, two_ranks, tmp_path):
    family, _ = base
    experts_alone_change(base, two_ranks, tmp_path, STAGES.get(family, (1,)))


@pytest.mark.grid
def test_so_in_every_zero_stage(base, two_ranks, tmp_path):
    experts_alone_change(base, two_ranks, tmp_path, (1, 2, 3))


def experts_alone_change(base, two_ranks, tmp_path, stages):
    family, directory = base
    alone = train_steps(run_of(directory, 1), 2)
    for stage in stages:
        cfg = run_of(directory, 2, ep=2, stage=stage)
        found = two_ranks.run(partial(train_steps, save=str(tmp_path / f"zero{stage}")), cfg, 2)
        torch.testing.assert_close(
            torch.tensor(found[0]["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=1e-5
        )
        assert difference(found, alone, "weights")[0] < 1e-4
        for row in diff(directory, found[0]["saved"]):
            assert row["same_bytes"] == (0 if row["part"] == "experts" else row["matrices"]), row
        before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (directory, found[0]["saved"]))
        assert type(after) is type(before)
        assert after.config.model_type == family
        again = two_ranks.run(partial(train_steps, source=found[0]["saved"], first=2), cfg, 1)
        straight = two_ranks.run(train_steps, cfg, 3)
        assert again[0]["losses"][0] == pytest.approx(straight[0]["losses"][2], rel=1e-6)

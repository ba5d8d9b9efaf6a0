"""Members whose architecture only our modelling code knows."""

import json
from pathlib import Path

import pytest
import torch
from ensemble_fakes import build, members
from merge.merge_fakes import WORDS, Words

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import ModelConfig
from moe_llm.config.distill import TeacherConfig
from moe_llm.distill.teachers import OwnTeacher, _described, load_teacher
from moe_llm.ensemble.causal_lm import load_causal_lm
from moe_llm.ensemble.processor import generate
from moe_llm.errors import UserError
from moe_llm.model.init import init_weights

SETTINGS = {
    "top_p": (4, {"p": 0.6}),
    "expert_choice": (2, {}),
    "lory": (1, {"segment_length": 2}),
    "soft_moe": (2, {"slots_per_expert": 1, "segment_length": 2}),
}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A function that saves a model with that router; nothing may ask whether its code is to be run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))

    def save(kind: str) -> Path:
        top_k, settings = SETTINGS[kind]
        config = ModelConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_local_experts=4,
            num_experts_per_tok=top_k,
            max_position_embeddings=64,
            initializer_range=0.3,
            router={"type": kind, **settings},
        )
        model = MoEForCausalLM(config)
        init_weights(model, 1)
        model.save_pretrained(tmp_path / kind)
        Words(WORDS).save(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.mark.parametrize("kind", SETTINGS)
def test_one_is_loaded_without_asking_and_is_a_member_like_any_other(saved, models, kind):
    directory = saved(kind)
    ids = torch.tensor([[3, 5, 4, 7, 6, 3, 8]])
    ours = MoEForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        torch.testing.assert_close(load_causal_lm(directory)(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    for order in ((str(directory), models["a"]), (models["a"], str(directory))):
        ensemble = build("linear", members(*order, weight=[0.5, 0.5]))
        inputs = ensemble.main.tokenizer("the cat sat", return_tensors="pt")
        cached, anew = (
            generate(ensemble, inputs, use_cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
            for cache in (True, False)
        )
        assert torch.equal(cached, anew)


def test_one_teaches(saved):
    teacher = TeacherConfig(path=str(saved("top_p")))
    assert _described(teacher, "distill.teachers.0")["model_type"] == "moe_llm"
    assert isinstance(load_teacher(teacher, torch.device("cpu"), "distill.teachers.0"), OwnTeacher)


def test_a_router_that_is_defined_elsewhere_is_refused(saved):
    directory = saved("top_p")
    content = json.loads((directory / "config.json").read_text())
    del content["auto_map"]
    (directory / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="a router that is defined elsewhere"):
        load_causal_lm(directory)

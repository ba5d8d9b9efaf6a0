"""scripts/to_vllm.py: the biases that vLLM's Qwen2-MoE has, as zeros; transformers and this package compute the same."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.training import MODEL

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import ModelConfig
from moe_llm.model.init import init_weights

SCRIPT = Path(__file__).parents[2] / "scripts/to_vllm.py"


def convert(monkeypatch, *words: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def checkpoint(tmp_path):
    model = MoEForCausalLM(ModelConfig(**MODEL, num_shared_experts=1, shared_expert_gate=True))
    init_weights(model, 5)
    model.save_pretrained(tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint/config.json").read_text())["architectures"] == ["Qwen2MoeForCausalLM"]
    return tmp_path / "checkpoint"


@torch.no_grad()
def test_zero_biases_change_no_logit_and_every_bias_is_there(checkpoint, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    convert(monkeypatch, checkpoint, tmp_path / "out")
    ids = torch.arange(24).view(2, 12)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert theirs.config.qkv_bias
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    ours = MoEForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    biases = load_file(tmp_path / "out/model-zero-biases.safetensors")
    assert len(biases) == 3 * MODEL["num_hidden_layers"]
    assert not any(tensor.any() for tensor in biases.values())


def test_what_needs_no_biases_and_an_output_that_is_there_are_refused(checkpoint, tmp_path, monkeypatch):
    convert(monkeypatch, checkpoint, tmp_path / "out")
    with pytest.raises(SystemExit, match="takes it as it is"):
        convert(monkeypatch, tmp_path / "out", tmp_path / "again")
    with pytest.raises(SystemExit, match="exists: name a new directory"):
        convert(monkeypatch, checkpoint, tmp_path / "out")


def test_a_head_width_that_vllm_would_not_read_is_refused(checkpoint, tmp_path, monkeypatch):
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(content | {"head_dim": 2 * content.get("head_dim", 32)}))
    with pytest.raises(SystemExit, match="vLLM's Qwen2-MoE takes hidden_size / num_attention_heads"):
        convert(monkeypatch, checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""gpt-oss as it is published: experts in MXFP4 are read as the values that they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.errors import UserError
from moe_llm.families import hf
from moe_llm.finetune.diff import diff

TOKENS = torch.randint(0, 24, (2, 11), generator=torch.Generator().manual_seed(1))
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A directory whose experts are in MXFP4 alone, every code and sign among them."""
    config = GptOssConfig(
        vocab_size=24,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("published")
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(directory)
    tensors, drawn = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(2)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=drawn)
        tensors[f"{name}_scales"] = torch.randint(120, 127, shape, dtype=torch.uint8, generator=drawn)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "quantization_config": QUANTIZED}))
    return directory


@pytest.fixture(scope="module")
def theirs(published):
    """transformers' reading, which unpacks where there is no kernel for the format."""
    return AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32, experts_implementation="eager")


def test_logits_are_transformers(published, theirs):
    ours = MoEForCausalLM.from_pretrained(published, dtype="fp32")
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_every_value_is_transformers_whatever_part_is_read(published, theirs):
    files, whole = TensorFiles(published), theirs.state_dict()
    assert not any(name.endswith(("_blocks", "_scales")) for name in files.names())
    for name in files.names():
        due = whole[name].to(files.dtype(name))
        assert torch.equal(files.read(name), due), name
        count = min(2, due.numel() - 1)  # of attention sinks there is one behind the first
        assert torch.equal(files.read_span(name, 1, count), due.flatten()[1 : 1 + count]), name
        if ".experts." in name:
            assert torch.equal(files.read(name, slice(1, 3)), due[1:3]), name
            assert files.dtype(name) == torch.bfloat16


def test_what_is_written_is_bf16_of_the_same_values_and_of_the_same_class(published, theirs, tmp_path):
    MoEForCausalLM.from_pretrained(published).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in content
    assert content["architectures"] == ["GptOssForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert all(row["same_bytes"] == row["matrices"] for row in diff(published, tmp_path))


def test_other_families_and_methods_are_refused_by_name(published):
    content = json.loads((published / "config.json").read_text())
    assert hf.from_transformers_config(content).architecture == "gpt_oss"
    for change, method in (
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"model_type": "olmoe"}, "mxfp4"),
    ):
        with pytest.raises(UserError, match=rf"quantised \({method}\)"):
            hf.from_transformers_config(content | change)

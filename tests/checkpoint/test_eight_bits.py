"""Weights in 8 bits: plain ones are read as what they are, quantised ones are refused in a true sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training import MODEL

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.config import ModelConfig
from moe_llm.ensemble.causal_lm import load_causal_lm
from moe_llm.errors import UserError
from moe_llm.model.init import init_weights


@pytest.fixture
def folders(tmp_path):
    """A checkpoint in FP8 and the same values in fp32."""
    model = MoEForCausalLM(ModelConfig(**MODEL))
    init_weights(model, 3)
    model.save_pretrained(tmp_path / "wide")
    state = load_file(tmp_path / "wide/model.safetensors")
    small = {n: t.to(torch.float8_e4m3fn) if "proj" in n or "block" in n else t for n, t in state.items()}
    shutil.copytree(tmp_path / "wide", tmp_path / "small")
    save_file(small, tmp_path / "small/model.safetensors", metadata={"format": "pt"})
    save_file({n: t.float() for n, t in small.items()}, tmp_path / "wide/model.safetensors", metadata={"format": "pt"})
    return tmp_path / "small", tmp_path / "wide"


def test_plain_fp8_weights_are_their_values(folders):
    ids_BS = torch.arange(12)[None]
    small, wide = (MoEForCausalLM.from_pretrained(folder, "fp32") for folder in folders)
    assert torch.equal(small(ids_BS).logits, wide(ids_BS).logits)
    theirs = load_causal_lm(folders[0], torch.float32)
    torch.testing.assert_close(theirs(ids_BS).logits, wide(ids_BS).logits)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_quantised_weights_are_named_as_such(folders, method):
    file = folders[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=r"quantization_config is set|is quantised"):
        MoEForCausalLM.from_pretrained(folders[0])
    with pytest.raises(UserError, match=rf"is quantised \({method}\), which needs a GPU"):
        load_causal_lm(folders[0])

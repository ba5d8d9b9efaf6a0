"""A published checkpoint of another family, its experts alone fine-tuned from the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import runs
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, Qwen3MoeConfig

from moe_llm.cli import main
from moe_llm.finetune.diff import diff

SHIPPED = Path(__file__).parents[2] / "configs/finetune/experts_only.yaml"
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A text, and a checkpoint of this package, for its tokenizer."""
    root = tmp_path_factory.mktemp("tokenized")
    text = runs.write_text(root / "text.txt")
    raw = runs.sections(text, root / "cache", root / "run", train={"max_steps": 1}, logging={"console": "off"})
    assert main(["train", str(runs.write_yaml(root / "base.yaml", raw))]) == 0
    return text, root / "run/checkpoints/latest"


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**SIZES, num_key_value_heads=1, head_dim=8, moe_intermediate_size=8, attention_bias=True),
        OlmoeConfig(**SIZES, intermediate_size=8),
    ],
    ids=["qwen3_moe", "olmoe"],
)
def test_experts_are_trained_and_all_else_stays_to_the_byte(config, tokenized, tmp_path):
    text, origin = tokenized
    config.vocab_size = json.loads((origin / "config.json").read_text())["vocab_size"]
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    base, model = tmp_path / "base", AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base)
    for file in origin.glob("*token*"):
        shutil.copy(file, base)
    given = {
        "model.init_from": base,
        "data.sources.0.path": text,
        "data.sources.0.document": "line",
        "data.cache_dir": tmp_path / "cache",
        "data.sequence_length": 32,
        "train.max_steps": 2,
        "run.dir": tmp_path / "run",
        "evaluate.max_blocks": 2,
        "optim.warmup_steps": 0,
        "train.device": "cpu",
    }
    assert main(["train", str(SHIPPED), *(f"{key}={value}" for key, value in given.items())]) == 0
    saved = tmp_path / "run/checkpoints/latest"
    for row in diff(base, saved):
        assert row["same_bytes"] == (0 if row["part"] == "experts" else row["matrices"]), row
    tuned = AutoModelForCausalLM.from_pretrained(saved)
    assert type(tuned) is type(model)
    assert AutoTokenizer.from_pretrained(saved).vocab_size

"""From a dense checkpoint of transformers to a trained mixture that transformers loads, by the commands of a user."""

import json

import pytest
import torch
from support import runs
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from moe_llm.cli import main


@pytest.mark.parametrize(
    ("config", "model"),
    [(MistralConfig, MistralForCausalLM), (LlamaConfig, LlamaForCausalLM)],
    ids=["mistral", "llama"],
)
def test_a_dense_model_is_upcycled_trained_and_loaded(config, model, tmp_path):
    raw = runs.sections(runs.write_text(tmp_path / "text.txt"), tmp_path / "cache", tmp_path / "tokenized")
    assert main(["tokenizer", str(runs.write_yaml(tmp_path / "tokenizer.yaml", raw))]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenized/tokenizer")
    torch.manual_seed(0)
    dense = model(
        config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")

    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "mixture"), "--num-local-experts", "4"]) == 0
    raw |= {"model": {"init_from": str(tmp_path / "mixture")}, "run": {**raw["run"], "dir": str(tmp_path / "run")}}
    raw.pop("tokenizer", None)
    assert main(["train", str(runs.write_yaml(tmp_path / "run.yaml", raw)), "train.max_steps=3"]) == 0

    saved = tmp_path / "run/checkpoints/latest"
    trained, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((saved / "config.json").read_text())["num_local_experts"] == 4
    experts = trained.model.layers[0].mlp.experts.down_proj.detach()
    assert len(experts.unique(dim=0)) == 4  # copies of one matrix, which training has told apart
    prompt = AutoTokenizer.from_pretrained(saved)("abc", return_tensors="pt")
    assert trained.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]

"""Preference tuning against TRL's trainer on the same pairs, step by step, in fp32."""

import json

import pytest
import torch
from support import runs

from moe_llm.cli import main

pytestmark = pytest.mark.neighbours
WORDS = ["abcd", "efg", "hijk", "lmn", "opab"]
PAIRS = [
    {
        "prompt": " ".join(WORDS[(i + j) % 5] for j in range(2 + i % 3)),
        "chosen": " " + " ".join(WORDS[(2 * i + j) % 5] for j in range(1 + i % 4)),
        "rejected": " " + " ".join(WORDS[(3 * i + 2 + j) % 5] for j in range(2 + (i + 2) % 3)),
    }
    for i in range(6)
]
PAIRS = [pair for pair in PAIRS if pair["chosen"] != pair["rejected"]]  # ties teach nothing, and we leave them out
STEPS, BETA, LR = 4, 0.3, 3e-3


@pytest.mark.parametrize(("ours", "theirs"), [("dpo", "sigmoid"), ("dpo_norm", "sigmoid_norm"), ("ipo", "ipo")])
def test_losses_and_weights_equal_trls_step_by_step(finished_run, cache, tmp_path, ours, theirs):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = finished_run / "checkpoints/step-00000006"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "y", "rejected": "z"}) + "\n")
    source = {"type": "files", "content": "preference"}
    raw = runs.sections(tmp_path, cache, tmp_path / "run")
    raw["model"] = {"init_from": str(base), "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    raw["data"] = {
        "sources": [{**source, "path": str(tmp_path / "pairs.jsonl")}],
        "validation_sources": [{**source, "path": str(tmp_path / "held_out.jsonl")}],
        "sequence_length": 64,
        "cache_dir": str(cache),
    }
    raw["preference"] = {"loss": ours, "beta": BETA}
    raw["optim"] = {"lr": LR, "schedule": "constant", "weight_decay": 0.0, "betas": [0.9, 0.999], "grad_clip": 1.0}
    blocks = 1
    for blocks in range(1, 7):  # as many blocks as there are: each step then has all pairs, in whatever order
        raw["train"] = {"max_steps": STEPS, "global_batch_size": blocks, "precision": "fp32", "device": "cpu"}
        if _blocks(raw, tmp_path) == blocks:
            break
    assert main(["train", str(runs.write_yaml(tmp_path / "ours.yaml", raw))]) == 0
    records = runs.records(tmp_path / "run")

    # as in our run; TRL adds the balance loss by itself where its weight is not 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, router_aux_loss_coef=0.0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=STEPS, per_device_train_batch_size=len(PAIRS), learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, beta=BETA, loss_type=[theirs], logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, save_strategy="no", disable_dropout=True,
        optim="adamw_torch", adam_epsilon=1e-8, max_grad_norm=1.0,
    )  # fmt: skip
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=2e-4)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / f"run/checkpoints/step-{STEPS:08d}", dtype=torch.float32)
    for (name, mine), other in zip(trained.named_parameters(), trainer.model.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def _blocks(raw: dict, tmp_path) -> int:
    from moe_llm.api import load_config
    from moe_llm.data.loader import load_data
    from moe_llm.data.tokenizer import build_tokenizer

    config = load_config(runs.write_yaml(tmp_path / "counted.yaml", raw))
    return len(load_data(config, build_tokenizer(config, tmp_path / "tokenizer")).train)

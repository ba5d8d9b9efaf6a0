# %%
# # Fine-tune the experts of a published mixture
#
# This tutorial trains the experts of a Qwen3-MoE and nothing else, proves that everything else has stayed the same to the
# byte, and serves the result over HTTP. Without an argument it makes a tiny stand-in with random weights, so that it needs
# no download; with the directory of a published checkpoint it does the same to that one.
#
#     python docs/tutorials/finetune_published.py [MODEL_DIR]

import json
import os
import shutil
import sys
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_llm
from moe_llm.cli import main
from moe_llm.finetune.diff import diff


def command(*words: str) -> None:
    """`moe-llm ...`, in this process; its mistakes end the tutorial."""
    if code := main(words):
        sys.exit(code)


TOY = os.environ.get("MOE_LLM_TUTORIAL") == "toy"
WORK = Path("runs/tutorial/finetuned")
TEXT = f"{sysconfig.get_path('stdlib')}/json/*.py"
STEPS = 2 if TOY else 50
RAW = {
    "run": {"dir": str(WORK / "run"), "seed": 1},
    "model": {"vocab_size": 512},
    "data": {"sources": [{"type": "files", "path": TEXT}], "sequence_length": 32, "cache_dir": str(WORK / "cache")},
    "finetune": {"trainable": "experts"},
    "optim": {"lr": 1e-3},
    "train": {"max_steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
    "checkpoint": {"every_steps": STEPS},
    "evaluate": {"max_blocks": 4},
}

# %%
# ## The model
#
# The stand-in gets a tokenizer that is trained on the text.

WORK.mkdir(parents=True, exist_ok=True)
if len(sys.argv) > 1:
    base = Path(sys.argv[1])
else:
    base = WORK / "base"
    (WORK / "tokenizer.yaml").write_text(
        yaml.safe_dump(RAW | {"run": {"dir": str(WORK / "tokenized")}, "finetune": {}})
    )
    command("tokenizer", str(WORK / "tokenizer.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(WORK / "tokenized/tokenizer")
    torch.manual_seed(1)
    shape = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3MoeForCausalLM(shape).save_pretrained(base)
    tokenizer.save_pretrained(base)

# %%
# ## Train the experts
#
# The shape and the tokenizer come from `model.init_from`. `configs/finetune/qwen3_30b_a3b.yaml` has the settings for the
# published model of 30 billion parameters on one node.

shutil.rmtree(WORK / "run", ignore_errors=True)
(WORK / "run.yaml").write_text(yaml.safe_dump(RAW | {"model": {"init_from": str(base)}}))
checkpoint = moe_llm.train(moe_llm.load_config(WORK / "run.yaml"))

# %%
# ## Prove what stayed
#
# `moe-llm diff` compares the two checkpoints part by part. In Python, the same rows are dictionaries.

command("diff", str(base), str(checkpoint))
rows = {row["part"]: row for row in diff(base, checkpoint)}
assert rows["experts"]["change"] > 0
assert all(row["same_bytes"] == row["matrices"] for part, row in rows.items() if part != "experts")
print("only the experts have changed")

# %%
# ## Serve it
#
# The checkpoint is a Qwen3-MoE like the published ones, so any server for these takes it. Here are twenty lines with
# transformers alone: `GET /def%20` answers with a continuation.

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        from urllib.parse import unquote

        inputs = tokenizer(unquote(self.path[1:]), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"text": tokenizer.decode(output[0], skip_special_tokens=True)}).encode())

    def log_message(self, *_: object) -> None:
        pass


with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with urlopen(f"http://127.0.0.1:{server.server_port}/def%20") as answer:
        print("answer of the server:", json.load(answer)["text"])
    server.shutdown()

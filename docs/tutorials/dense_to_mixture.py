# %%
# # From a dense model to a mixture
#
# This tutorial makes a mixture of a dense Llama, gives each half of its experts one kind of text, and looks at which
# tokens the router then sends where. On a CPU it takes minutes; `MOE_LLM_TUTORIAL=toy` takes
# seconds. Give the path of a Llama or Mistral checkpoint of your own to begin with that one instead.
#
#     python docs/tutorials/dense_to_mixture.py [DENSE_DIR]

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import moe_llm
from moe_llm.cli import main


def command(*words: str) -> None:
    """`moe-llm ...`, in this process; its mistakes end the tutorial."""
    if code := main(words):
        sys.exit(code)


TOY = os.environ.get("MOE_LLM_TUTORIAL") == "toy"
ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(sysconfig.get_path("stdlib"))
WORK = Path("runs/tutorial/upcycled")
CODE, PROSE = f"{LIBRARY}/json/*.py" if TOY else f"{LIBRARY}/*.py", f"{ROOT}/docs/guides/*.md"
SIZES = {"hidden_size": 16, "intermediate_size": 32} if TOY else {"hidden_size": 192, "intermediate_size": 512}
LENGTH, STEPS = (32, 2) if TOY else (256, 200)

# %%
# ## Two kinds of text
#
# The sources are Python code and this project's guides. The configuration is that of the mixture; at first only its
# tokenizer is made, which the dense model will share.

raw = {
    "run": {"dir": str(WORK / "run"), "seed": 1},
    "model": {"vocab_size": 512 if TOY else 2048},
    "data": {
        "sources": [{"type": "files", "path": CODE, "weight": 1}, {"type": "files", "path": PROSE, "weight": 1}],
        "sequence_length": LENGTH,
        "cache_dir": str(WORK / "cache"),
    },
    "optim": {"lr": 1e-3, "warmup_steps": 0 if TOY else 10},
    "train": {"max_steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4 if TOY else 16, "precision": "fp32"},
    "checkpoint": {"every_steps": STEPS},
    "evaluate": {"max_blocks": 16},
}
WORK.mkdir(parents=True, exist_ok=True)
(WORK / "mixture.yaml").write_text(yaml.safe_dump(raw))
command("tokenizer", str(WORK / "mixture.yaml"))
tokenizer = AutoTokenizer.from_pretrained(WORK / "run/tokenizer")

# %%
# ## A dense model
#
# Without one of yours, a small Llama is trained for a few steps by a plain loop.

if len(sys.argv) > 1:
    dense = Path(sys.argv[1])
else:
    dense = WORK / "dense"
    torch.manual_seed(1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=2 if TOY else 4,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64 if TOY else 1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **SIZES,
        )
    )
    files = sorted(LIBRARY.glob("json/*.py")) + sorted((ROOT / "docs/guides").glob("*.md"))
    ids = torch.tensor(tokenizer("\n".join(file.read_text(encoding="utf-8") for file in files))["input_ids"])
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
    for _ in range(STEPS):
        batch = blocks[torch.randint(len(blocks), (4,))]
        loss = llama(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"dense model: loss {loss.item():.2f}")
    llama.save_pretrained(dense)
    tokenizer.save_pretrained(dense)

# %%
# ## Upcycle
#
# Each of the eight experts is a copy of the dense feed-forward layer, of which half of the units are drawn anew, so that
# the copies differ from the first step on (drop-upcycling).

shutil.rmtree(WORK / "mixture", ignore_errors=True)
command("upcycle", str(dense), str(WORK / "mixture"), "--num-local-experts", "8", "--reinit", "0.5")

# %%
# ## Experts of one's own data
#
# While training, code may only go to experts 0 to 3 and prose to 4 to 7. The router learns to tell them apart; afterwards
# it routes freely.

raw["model"] = {"init_from": str(WORK / "mixture")}
raw["finetune"] = {"expert_sources": [[0, 1, 2, 3], [4, 5, 6, 7]]}
(WORK / "mixture.yaml").write_text(yaml.safe_dump(raw))
shutil.rmtree(WORK / "run", ignore_errors=True)
checkpoint = moe_llm.train(moe_llm.load_config(WORK / "mixture.yaml"))

# %%
# ## Which tokens go where
#
# `inspect` writes a page on which the text is coloured by expert, and pictures: `sources.png` shows the load of every
# expert by source.

shutil.rmtree(WORK / "inspected", ignore_errors=True)
texts = [f"{LIBRARY}/json/decoder.py", f"{ROOT}/README.md"]
tokens = "200" if TOY else "5000"
command("inspect", str(checkpoint), "--data", *texts, "--max-tokens", tokens, "--out", str(WORK / "inspected"))
print("pictures:", ", ".join(sorted(path.name for path in (WORK / "inspected").rglob("*.png"))))

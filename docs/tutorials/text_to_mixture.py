# %%
# # From text to a mixture and its report
#
# This tutorial trains a small mixture of experts on the source text of Python's own standard library, which is on every
# machine, measures it, lets it write, and draws its report. It takes about four minutes on two cores of a CPU and needs no
# network. With `MOE_LLM_TUTORIAL=toy` it takes seconds, on a model too small to learn anything.
#
#     python docs/tutorials/text_to_mixture.py

import os
import sys
import sysconfig
from pathlib import Path

import moe_llm
from moe_llm.cli import main


def command(*words: str) -> None:
    """`moe-llm ...`, in this process; its mistakes end the tutorial."""
    if code := main(words):
        sys.exit(code)


TOY = os.environ.get("MOE_LLM_TUTORIAL") == "toy"
LIBRARY = Path(sysconfig.get_path("stdlib"))
RUN = Path("runs/tutorial/mixture")

# %%
# ## The configuration
#
# A run is one YAML file. `load_config` reads it and applies overrides, which are written as on the command line. This is
# the quickstart with a directory of its own.

overrides = [f"run.dir={RUN}", "run.seed=1"]
if TOY:
    overrides += [
        "model={vocab_size: 512, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
        "num_key_value_heads: 1, num_local_experts: 4, num_experts_per_tok: 2, max_position_embeddings: 64}",
        f"data={{sources: [{{type: files, path: '{LIBRARY}/json/*.py'}}], sequence_length: 32, cache_dir: cache}}",
        "train={max_steps: 4, micro_batch_size: 2, global_batch_size: 4, precision: fp32, device: cpu}",
        "optim={lr: 3e-3}",
        "checkpoint={every_steps: 2}",
        "evaluate={every_steps: 2, max_blocks: 4, sample_prompt: 'def '}",
    ]
config = moe_llm.load_config("configs/quickstart.yaml", overrides)
print(f"{config.model.num_local_experts} experts, {config.model.num_experts_per_tok} of them for each token")

# %%
# ## Train
#
# `train` makes the tokenizer, prepares the text, trains, and returns the newest checkpoint. If it is interrupted, the same
# call resumes the run.

checkpoint = moe_llm.train(config)

# %%
# ## Measure, and let it write
#
# The text to measure on should not be in the training data. This file is not.

result = moe_llm.evaluate(checkpoint, str(Path(__file__).resolve()), max_blocks=8)
print(f"bits per byte of this tutorial: {result['bits_per_byte']:.2f}")
print(moe_llm.generate(checkpoint, "def ", max_new_tokens=24, temperature=0))

# %%
# ## The report
#
# The page has the losses, the load of every expert over time, and the alarms that were raised. It is `report.html` in
# the run, and the same plots are PNG files in `report_plots/` beside it.

command("report", str(RUN))

# %%
# ## In transformers
#
# A checkpoint is an ordinary one of transformers.

from transformers import AutoModelForCausalLM  # noqa: E402

model = AutoModelForCausalLM.from_pretrained(checkpoint)
print(type(model).__name__, f"{model.num_parameters():,} parameters")

"""Train a small model from Python, measure it, and let it write.

python docs/examples/train_and_generate.py configs/quickstart.yaml run.dir=runs/example train.max_steps=20
"""

import sys

import moe_llm

path, *overrides = sys.argv[1:]
config = moe_llm.load_config(path, overrides)
checkpoint = moe_llm.train(config)  # running the script again resumes the run

result = moe_llm.evaluate(checkpoint, __file__, max_blocks=8)
print("bits per byte of this file:", round(result["bits_per_byte"], 3))
print(moe_llm.generate(checkpoint, "def ", max_new_tokens=16, temperature=0))

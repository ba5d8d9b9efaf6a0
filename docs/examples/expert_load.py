"""How often each expert of a trained model is chosen, layer by layer, for a text.

python docs/examples/expert_load.py runs/quickstart/checkpoints/latest "def add(a, b):"
"""

import sys

import torch
from transformers import AutoTokenizer

from moe_llm import MoEForCausalLM

checkpoint, text = sys.argv[1:]
model = MoEForCausalLM.from_pretrained(checkpoint)
inputs = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt")
with torch.no_grad():
    counts_LE = model(inputs["input_ids"]).routing.tokens_per_expert_E
for layer, counts in enumerate(counts_LE.long().tolist()):
    print(f"layer {layer}:", counts)

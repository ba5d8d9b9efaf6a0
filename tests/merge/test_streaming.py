"""Memory while merging: a few spans and one tensor that is being written, whatever the models' size and number."""

import subprocess
import sys

import pytest

_PEAK = """
import resource, sys, json, torch
from pathlib import Path
from moe_llm.checkpoint.safetensors_io import ShardWriter, Spec
from moe_llm.checkpoint import hf
from moe_llm.config import ModelConfig
import scipy.optimize, moe_llm.merge.run
from moe_llm.merge.recipe import parse_recipe
root, method = Path(sys.argv[1]), sys.argv[2]
config = ModelConfig(vocab_size=5000, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
                     num_attention_heads=4, num_local_experts=8)
shapes = hf.parameter_shapes(config)
pieces = [piece for name, shape in shapes.items() for piece in hf.pieces(name, shape)]
specs = [Spec(piece.name, piece.shape, torch.float32) for piece in pieces]
for i in range(4):
    (root / f"m{i}").mkdir()
    content = hf.to_transformers_config(config, bos_token_id=1, eos_token_id=2, dtype="fp32")
    (root / f"m{i}/config.json").write_text(json.dumps(content))
    writer = ShardWriter(root / f"m{i}/model.safetensors", specs)
    for spec in specs:
        writer.write(spec.name, torch.full(spec.shape, 0.01).normal_(generator=torch.Generator().manual_seed(i)))
    writer.close()
largest, whole = max(spec.nbytes for spec in specs), sum(spec.nbytes for spec in specs)
models = [{"model": str(root / f"m{i}"), "parameters": {"weight": 0.3}} for i in range(4)]
raw = {"merge_method": method, "models": models, "base_model": models[0]["model"]}
if method != "linear":
    raw["parameters"] = {"density": 0.3}
if method == "linear":
    raw |= {"align_experts": "weights"}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(sizes, out):
    moe_llm.merge.run.merge_recipe(parse_recipe(sizes), root / out, say=lambda _: None)
small = root / "small"
# what code and allocator take once, on a part of the work: not a matter of size
warm = {"merge_method": "passthrough", "slices": [{"sources": [{"model": models[0]["model"], "layer_range": [0, 1]}]}]}
run(warm, "warm")
before = peak()
run(raw, "out")
print((peak() - before) / largest, whole / largest)
"""


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_memory_stays_below_three_of_the_largest_tensors(tmp_path, method):
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path), method], capture_output=True, text=True, check=True
    )
    taken, whole = map(float, done.stdout.split())
    assert taken < 3, "of the largest tensors"
    assert whole > 10, "a test of a model that is not much larger than its largest tensor proves nothing"

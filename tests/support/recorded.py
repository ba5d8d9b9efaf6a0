"""Run directories as training leaves them, without training: for what only reads them."""

import json
import math
from pathlib import Path

from support import runs

LAYERS, EXPERTS = runs.MODEL["num_hidden_layers"], runs.MODEL["num_local_experts"]


def recorded_run(directory: Path, steps: int = 30, floor: float = 2.0, **changes) -> Path:
    """Records of `steps` steps, validation every 10; expert 1 of layer 0 is starved from the middle on."""
    directory.mkdir(parents=True)
    raw = runs.sections(directory / "text.txt", directory / "cache", directory, **changes)
    runs.write_yaml(directory / "config.yaml", raw)
    lines = [json.dumps(_record(step, steps, floor)) for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    start = {
        "time": "2030-01-01T00:00:00+00:00",
        "step": 0,
        "ranks": 2,
        "device": "a <device>",
        "threads": 1,
        "peak_flops_per_second": 1e9,
        "versions": {"torch": "2"},
    }
    source = {"name": "sources.0", "split": "train", "documents": 7, "tokens": 12345, "bytes": 54321, "blocks": 3}
    (directory / "facts.json").write_text(json.dumps({"data": [source], "starts": [start]}))
    return directory


def _record(step: int, steps: int, floor: float) -> dict:
    loss = floor + 3 * math.exp(-step / 10)
    starved = 0 if step > steps // 2 else 10
    counts = [[20 - starved, starved, 10, 10], *[[10] * EXPERTS] * (LAYERS - 1)]
    record = {
        "step": step,
        "tokens": 128 * step,
        "loss": loss,
        "lm_loss": loss,
        "tokens_per_second": 1280.0,
        "grad_norm": 1 / step,
        "lr": 1e-3,
        "moe": {
            "tokens_per_expert": counts,
            "load_cv": [0.5, 0.0],
            "router_entropy": [1.0, 1.2],
            "dropped_share": [0.0, 0.0],
            "dead_experts": [[1] if starved == 0 else [], []],
            "expert_grad_norm": [[1.0, None, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]],
        },
    }
    if step % 10 == 0:
        record |= {"val_loss": loss + 0.1, "val_bits_per_byte": loss / 2}
    if step == steps:
        record["alarms"] = [{"kind": "dying_expert", "places": [[0, 1]], "sentence": "layer 0 expert 1: <dying>"}]
    return record

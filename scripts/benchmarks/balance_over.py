"""The price of `model.balance_over: step`: CPU seconds of a step beside `micro_batches`, alternating in one process; and
with the activations of all micro-batches held (`train.held_micro_batches`).

python scripts/benchmarks/balance_over.py configs/quickstart.yaml train.micro_batch_size=4
"""

import sys
import time

import numpy as np
import torch

from moe_llm.config import load_config
from moe_llm.config.load import validate
from moe_llm.data.blocks import TrainBlocks
from moe_llm.data.cache import TokenizedText
from moe_llm.data.loader import TrainLoader
from moe_llm.data.packing import PackedBlocks
from moe_llm.distributed.runtime import start
from moe_llm.distributed.step_loss import StepLoss, forward_passes
from moe_llm.train.build import build_trained

REPEATS = 7
WAYS = {"micro_batches": ("micro_batches", 1), "step": ("step", 1), "step, all held": ("step", 1_000)}


def main() -> None:
    torch.set_num_threads(1)  # CPU seconds of one thread do not depend on what else the machine does
    config = load_config(sys.argv[1], sys.argv[2:])
    runtime = start(config)
    engine, _ = build_trained(config, runtime, None)
    length = (config.data.sequence_length + 1) * 4 * config.train.global_batch_size
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, length).astype(np.uint16)
    text = TokenizedText(tokens, np.array([0, length]), np.array([length]), length)
    blocks = PackedBlocks(text, config.data.sequence_length, config.data.isolate_documents, pad=0)
    sizes = {
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
    }
    raw = config.model_dump(mode="json")
    seconds: dict[str, list[float]] = {}
    with TrainLoader(TrainBlocks([blocks], None, 0), position=0, prefetch=0, **sizes) as loader:
        for _ in range(1 + REPEATS):
            batches = next(loader)
            for way, (over, held) in WAYS.items():
                model = validate({**raw, "model": {**raw["model"], "balance_over": over}}).model
                begin = time.process_time()
                step_loss = StepLoss(model, runtime, batches)
                for i, output in enumerate(forward_passes(engine, step_loss, batches, held=held)):
                    engine.backward(step_loss(output).total, last=i == len(batches) - 1)
                engine.step(1e-4)
                seconds.setdefault(way, []).append(time.process_time() - begin)
    least = {way: min(times[1:]) for way, times in seconds.items()}
    base = least["micro_batches"]
    print(f"{config.accumulation_steps(1)} micro-batches a step: {base:.3f} s with micro_batches")
    for way in ("step", "step, all held"):
        print(f"  {way}: {least[way]:.3f} s, {least[way] / base - 1:+.1%}")


if __name__ == "__main__":
    main()

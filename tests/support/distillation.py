"""A few steps of a student, without a run directory's files, in any layout."""

from pathlib import Path
from typing import Any

import torch
from support.ranks import fresh_accelerate


def learn(config) -> dict[str, Any]:
    """Train to `config.max_steps` in this rank's process.

    Returns: losses of each step by name, over all ranks; gradients of the first step and weights after the last, as
    `support.training.train_steps` gives them; what was said.
    """
    from moe_llm.data.loader import TrainLoader, load_data
    from moe_llm.data.packing import model_inputs
    from moe_llm.data.tokenizer import load_tokenizer
    from moe_llm.distill.teaching import build_teaching
    from moe_llm.distributed.runtime import start
    from moe_llm.distributed.step_loss import StepLoss
    from moe_llm.train.build import build_trained
    from moe_llm.train.trainer import learning_rate, seed_noise

    fresh_accelerate()
    runtime = start(config)
    place = {"rank": runtime.rank, "world_size": runtime.world_size}
    tokenizer = load_tokenizer(Path(config.tokenizer.path))
    data = load_data(config, tokenizer, **place, show_progress=False)
    engine, _ = build_trained(config, runtime, None)
    said: list[str] = []
    G = config.train.global_batch_size
    teach = build_teaching(
        config, runtime, data.train, tokenizer, start=0, samples=config.max_steps * G, say=said.append
    )
    loader = TrainLoader(
        data.train, position=0, global_batch_size=G, prefetch=0, micro_batch_size=config.train.micro_batch_size, **place
    )
    losses, gradients = [], {}
    for step in range(config.max_steps):
        batches = next(loader)
        seed_noise(config.run.seed, step, runtime.rank)
        step_loss, sums = StepLoss(config.model, runtime, batches), torch.zeros(3)
        for i, batch in enumerate(batches):
            found = step_loss(engine.forward(**model_inputs(batch), **teach(batch)))
            engine.backward(found.total, last=i == len(batches) - 1)
            sums += torch.stack([found.total.detach(), found.lm, found.distill])
        if step == 0:
            gradients = {e.name: (e.first_expert, engine.gradient(e.name).clone()) for e in engine.entries()}
        engine.step(learning_rate(config, step))
        total, lm, soft = (runtime.sum(sums) / runtime.world_size).tolist()
        losses.append({"total": total, "lm": lm, "distill": soft if config.distill.teachers else None})
    weights = {e.name: (e.first_expert, engine.read(e.name, "weight").clone()) for e in engine.entries()}
    return {"losses": losses, "gradients": gradients, "weights": weights, "said": said}

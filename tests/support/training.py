"""A few training steps on random tokens, in any layout: what parity tests compare."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from support.ranks import fresh_accelerate

from moe_llm.config.load import validate
from moe_llm.data.packing import Batch
from moe_llm.distributed.runtime import start
from moe_llm.distributed.step_loss import StepLoss, forward_passes
from moe_llm.model.moe.router import begin_step, end_step
from moe_llm.train.build import build_trained
from moe_llm.train.callbacks.adversarial import find_perturbation
from moe_llm.train.metrics import expert_gradient_norms
from moe_llm.train.trainer import learning_rate, seed_noise

MODEL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
    "initializer_range": 0.2,
}
LENGTH = 12


def config(micro: int, rounds: int, world: int, *, ep: int = 1, stage: int = 1, optimizer: str = "sgd", **more: Any):
    """A run of `rounds` micro-batches a step; sections in `more` are merged in."""
    raw: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 3},
        "model": MODEL,
        "data": {"sources": [{"type": "python_stdlib"}], "sequence_length": LENGTH},
        "optim": {
            "name": optimizer,
            "lr": 0.3 if optimizer == "sgd" else 3e-3,
            "grad_clip": 0.5,
            "schedule": "constant",
            "eps": 1e-6,
        },
        "train": {
            "max_steps": 100,
            "micro_batch_size": micro,
            "global_batch_size": micro * rounds * world,
            "precision": "fp32",
            "device": "cpu",
        },
        "parallel": {"expert_parallel_size": ep, "zero_stage": stage},
    }
    for section, values in more.items():
        raw[section] = {**raw.get(section, {}), **values}
    return validate(raw)


def rows(step: int, start_row: int, count: int) -> Batch:
    """Rows of a step by their global index; every third is padded, so that ranks differ in their real tokens."""
    made = [_row(step, start_row + i) for i in range(count)]
    ids, labels, mask = (torch.stack(parts) for parts in zip(*made))
    positions = torch.arange(LENGTH).expand_as(ids)
    return Batch(
        input_ids_BS=ids, labels_BS=labels, position_ids_BS=positions, document_ids_BS=None, attention_mask_BS=mask
    )


def _row(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(
        0, MODEL["vocab_size"], (LENGTH + 1,), generator=torch.Generator().manual_seed(1000 * step + index)
    )
    mask = torch.ones(LENGTH, dtype=torch.bool)
    if index % 3 == 2:
        mask[LENGTH - 1 - (index + step) % 7 :] = False
    return tokens[:-1], tokens[1:].masked_fill(~mask, -100), mask


def padded_rows(cfg, runtime, step: int, rounds: int) -> list[Batch]:
    """This rank's micro-batches of a step."""
    micro = cfg.train.micro_batch_size
    return [rows(step, (j * runtime.world_size + runtime.rank) * micro, micro) for j in range(rounds)]


def train_steps(
    cfg, steps: int, *, source: str | None = None, first: int = 0, save: str | None = None, read=padded_rows, see=None
) -> dict:
    """Losses and grad norms of some steps, gradients of the first, weights after the last.

    Tensors are this rank's own; expert tensors come as (first expert, tensor). see: gives "seen" of the engine at the end.
    """
    fresh_accelerate()
    runtime = start(cfg)
    from pathlib import Path

    engine, position = build_trained(cfg, runtime, Path(source) if source else None)
    assert position.step == first
    adversarial = cfg.train.adversarial

    def perturb(inputs: dict) -> dict:
        off = adversarial.epsilon is None
        return {} if off else {"perturbation": find_perturbation(engine.model, inputs, adversarial)}

    result: dict[str, Any] = {"losses": [], "aux": [], "norms": [], "gradients": {}, "weights": {}}
    rounds = cfg.accumulation_steps(runtime.world_size)
    for step in range(first, first + steps):
        seed_noise(cfg.run.seed, step, runtime.rank)
        begin_step(engine.model, step)
        turn = cfg.train.adversarial.turn(step)
        engine.set_phase(turn)
        batches = read(cfg, runtime, step, rounds)
        step_loss = StepLoss(cfg.model, runtime, batches)
        shares = torch.zeros(2)
        passes = forward_passes(engine, step_loss, batches, held=cfg.train.held_micro_batches, perturb=perturb)
        for j, output in enumerate(passes):
            losses = step_loss(output)
            engine.backward(losses.total, last=j == rounds - 1)
            shares += torch.stack([losses.total.detach(), losses.aux])
        if step == first:
            result["gradients"] = _named(engine, engine.gradient, trained=True)
            result["expert_norms"] = expert_gradient_norms(engine, runtime)
        result["norms"].append(engine.step(learning_rate(cfg, step)))
        if turn != "rest":
            end_step(engine.model, step_loss.routing)
        loss, aux = (runtime.sum(shares) / runtime.world_size).tolist()
        result["losses"].append(loss)
        result["aux"].append(aux)
    if see is not None:
        result["seen"] = see(engine)
    result["weights"] = _named(engine, lambda name: engine.read(name, "weight"))
    for kind in engine.kinds:
        read_kind = partial(engine.read, kind=kind)
        result[kind] = _named(engine, read_kind, trained=True, kind=kind) if steps or first else {}
    with engine.weights_for_use() if save else nullcontext():
        result |= _save(engine, cfg, first + steps, save) if save else {}
    return result


def _save(engine, cfg, at: int, save: str) -> dict:
    from moe_llm.checkpoint.state import save_checkpoint
    from moe_llm.config import dump_config

    saved = save_checkpoint(
        save,
        engine,
        step=at,
        trainer_state={
            "step": at,
            "samples": at * cfg.train.global_batch_size,
            "tokens": at * cfg.tokens_per_step,
        },
        model_config=cfg.model,
        run_config_text=dump_config(cfg),
        tokenizer=None,
        dtype=cfg.checkpoint.dtype,
    )
    return {"saved": str(saved)}


def _named(engine, read, trained: bool = False, kind: str | None = None) -> dict[str, tuple[int | None, torch.Tensor]]:
    entries = [entry for entry in engine.entries() if entry.trainable or not trained]
    entries = [entry for entry in entries if kind is None or entry.kinds_among((kind,))]
    return {entry.name: (entry.first_expert, read(entry.name).clone()) for entry in entries}


def difference(found: list[dict], expected: dict, what: str, floor: float = 1e-8) -> tuple[float, str]:
    """Largest difference relative to the tensor's own largest value, or to `floor` where that is larger, over all ranks,
    and where."""
    worst = (0.0, "")
    for per_rank in found:
        for name, (first, tensor) in per_rank[what].items():
            whole = expected[what][name][1]
            if first is not None:
                whole = whole[first : first + len(tensor)]
            assert tensor.shape == whole.shape, name
            scale = expected[what][name][1].abs().max().clamp(min=floor)
            worst = max(worst, (((tensor - whole).abs().max() / scale).item(), name))
    return worst

"""Faults, each put in place around a process's work: `fault(rank)` is a context manager, rank None the one process."""

import contextlib
import dataclasses
from unittest import mock

import torch


def on_ranks(rank, *patch):
    """A patch that the one process does not get."""
    return contextlib.nullcontext() if rank is None else mock.patch.object(*patch)


def experts_left_out_of_the_optimizer(rank):
    return _left_out(rank, lambda name: ".experts." in name)


def half_of_each_expert_left_out_of_the_optimizer(rank):
    return _left_out(rank, lambda name: name.endswith("experts.down_proj"))


def _left_out(rank, chosen):
    from moe_llm.train import run

    real = run.parameter_groups

    def groups(model, decay):
        left_out = {id(p) for name, p in model.named_parameters() if chosen(name)}
        return [
            {**group, "params": [p for p in group["params"] if id(p) not in left_out]} for group in real(model, decay)
        ]

    return on_ranks(rank, run, "parameter_groups", groups)


def other_experts_decay_too(rank):
    """All rows of a stacked parameter decay, those of the experts too that are not trained."""
    from moe_llm.distributed import deepspeed

    real = deepspeed.decay_rows

    def every_row(parameter, rows, factor, optimizer):
        held = getattr(parameter, "ds_shape", parameter.shape)[0]
        real(parameter, list(range(held)), factor, optimizer)

    return on_ranks(rank, deepspeed, "decay_rows", every_row)


def experts_never_stepped(rank):
    """The optimizer knows the experts, and a step leaves them as they were."""
    from moe_llm.distributed.engine import DeepSpeedEngine

    real = DeepSpeedEngine.step

    def step(self, lr):
        before = {e.name: self.read(e.name, "weight") for e in self.entries() if e.first_expert is not None}
        norm = real(self, lr)
        for name, weight in before.items():
            self.write(name, "weight", weight)
        return norm

    return mock.patch.object(DeepSpeedEngine, "step", step)


def expert_gradients_scaled_by_the_ranks(rank):
    from moe_llm.train import run

    real = run.build_model

    def build(*arguments, **named):
        model = real(*arguments, **named)
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.register_hook(lambda gradient: gradient * 2)
        return model

    return on_ranks(rank, run, "build_model", build)


def loss_scaled_twice(rank):
    from moe_llm.distributed.engine import DeepSpeedEngine

    real = DeepSpeedEngine.backward
    return mock.patch.object(DeepSpeedEngine, "backward", lambda self, loss, last: real(self, loss * 2, last=last))


def balance_loss_per_rank(rank):
    from moe_llm.distributed import step_loss

    def own(statistics, runtime):
        return type(statistics)(*(part.detach() * runtime.world_size for part in statistics))

    return mock.patch.object(step_loss, "sum_over_ranks", own)


def padding_counted(rank):
    from moe_llm.model.moe import router

    real = router.router_statistics

    def everything(logits_TE, probability_TE, expert_TK, mask_BS, **options):
        return real(logits_TE, probability_TE, expert_TK, torch.ones_like(mask_BS), **options)

    return mock.patch.object(router, "router_statistics", everything)


def clip_norm_per_rank(rank):
    """Each rank clips by the norm of what it holds itself."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def own(self, gradients, params, norm_type=2):
        return torch.stack([g.double().norm() for g in gradients]).norm().float()

    return mock.patch.object(DeepSpeedZeroOptimizer, "get_grad_norm_direct", own)


def one_ranks_experts_exported(rank):
    from moe_llm.checkpoint import state

    real = state.stream

    def stream(engine, *arguments, **named):
        for stem, name, tensor in real(engine, *arguments, **named):
            lost = engine.rank > 0 and ".experts." in name
            yield stem, name, torch.zeros_like(tensor) if lost else tensor

    return mock.patch.object(state, "stream", stream)


def config_that_transformers_refuses(rank):
    from moe_llm.checkpoint import hf

    real = hf.to_transformers_config
    return on_ranks(rank, hf, "to_transformers_config", lambda *a, **k: {**real(*a, **k), "model_type": "unheard_of"})


def stale_data_position(rank):
    from moe_llm.train import run

    real = run.load_checkpoint
    return mock.patch.object(run, "load_checkpoint", lambda *a, **k: {**real(*a, **k), "samples": 0})


def ranks_read_the_same_blocks(rank):
    from moe_llm.doctor import observe

    real = observe.TrainLoader
    return mock.patch.object(observe, "TrainLoader", lambda *a, **k: real(*a, **{**k, "rank": 0}))


def recomputation_with_other_noise(rank):
    from moe_llm.model import decoder

    real = decoder.checkpoint
    return mock.patch.object(decoder, "checkpoint", lambda *a, **k: real(*a, **k, preserve_rng_state=False))


def documents_see_each_other(rank):
    from moe_llm.train import loop

    real = loop.model_inputs
    return mock.patch.object(loop, "model_inputs", lambda b: real(dataclasses.replace(b, document_ids_BS=None)))


def a_rank_dies(rank):
    import os

    from moe_llm.train import loop

    def die(*arguments):
        print("the end is near", flush=True)
        os._exit(7)

    return mock.patch.object(loop, "learning_rate", die) if rank == 1 else contextlib.nullcontext()


def noise_without_effect(rank):
    from moe_llm.model.moe.routers import mixtral

    real = mixtral.MixtralRouter.forward

    def forward(self, x_BSD, mask_BS):
        self.jitter = 0.0
        return real(self, x_BSD, mask_BS)

    return mock.patch.object(mixtral.MixtralRouter, "forward", forward)


def capacity_beyond_a_sequence(rank):
    """Whoever comes first in the micro-batch is served, so that the layout decides."""
    from moe_llm.model.moe import token_choice

    real = token_choice.assign

    def assign(preference_BSR, mask_BS, top_k, num_experts, capacity, wanted_BSR=None):
        together, all_real = preference_BSR.flatten(0, 1)[None], mask_BS.flatten()[None]
        return real(together, all_real, top_k, num_experts, capacity).view_as(preference_BSR)

    return mock.patch.object(token_choice, "assign", assign)


def one_process_raises(rank):
    from moe_llm.train import loop

    def no_step(*arguments):
        raise RuntimeError("no step today")

    return mock.patch.object(loop, "learning_rate", no_step) if rank is None else contextlib.nullcontext()

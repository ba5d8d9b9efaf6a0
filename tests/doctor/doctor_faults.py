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
    from moe_llm.train import build

    real = build.parameter_groups

    def groups(model, decay, *more):
        left_out = {id(p) for name, p in model.named_parameters() if chosen(name)}
        return [
            {**group, "params": [p for p in group["params"] if id(p) not in left_out]}
            for group in real(model, decay, *more)
        ]

    return on_ranks(rank, build, "parameter_groups", groups)


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
    from moe_llm.train import build

    real = build.build_model

    def doubled(*arguments, **named):
        model = real(*arguments, **named)
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.register_hook(lambda gradient: gradient * 2)
        return model

    return on_ranks(rank, build, "build_model", doubled)


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
    from moe_llm.families import hf

    real = hf.to_transformers_config
    return on_ranks(rank, hf, "to_transformers_config", lambda *a, **k: {**real(*a, **k), "model_type": "unheard_of"})


def stale_data_position(rank):
    from moe_llm.train import build

    real = build.load_checkpoint
    return mock.patch.object(build, "load_checkpoint", lambda *a, **k: {**real(*a, **k), "samples": 0})


def ranks_read_the_same_blocks(rank):
    from moe_llm.train import trainer

    real = trainer.TrainLoader
    return mock.patch.object(trainer, "TrainLoader", lambda *a, **k: real(*a, **{**k, "rank": 0}))


def recomputation_with_other_noise(rank):
    from moe_llm.model import decoder

    real = decoder.checkpoint
    return mock.patch.object(decoder, "checkpoint", lambda *a, **k: real(*a, **k, preserve_rng_state=False))


def documents_see_each_other(rank):
    from moe_llm.distributed import step_loss as forward_passes

    real = forward_passes.model_inputs
    return mock.patch.object(
        forward_passes,
        "model_inputs",
        lambda b: real(dataclasses.replace(b, document_ids_BS=None, runs_B=None)),
    )


def a_rank_dies(rank):
    import os

    from moe_llm.train import trainer

    def die(*arguments):
        print("the end is near", flush=True)
        os._exit(7)

    return mock.patch.object(trainer, "learning_rate", die) if rank == 1 else contextlib.nullcontext()


def noise_without_effect(rank):
    from moe_llm.model.moe.routers import mixtral

    real = mixtral.MixtralRouter.forward

    def forward(self, x_BSD, mask_BS, document_BS=None):
        self.jitter = 0.0
        return real(self, x_BSD, mask_BS, document_BS)

    return mock.patch.object(mixtral.MixtralRouter, "forward", forward)


def capacity_beyond_a_sequence(rank):
    """Whoever comes first in the micro-batch is served, so that the layout decides."""
    from moe_llm.model.moe import router

    real = router.assign_by_position

    def serve(preference_BSR, groups, top_k, num_experts, capacity_BS, wanted_BSR=None):
        together, every = preference_BSR.flatten(0, 1)[None], router.Groups.of(groups.mask_BS.flatten()[None])
        return real(together, every, top_k, num_experts, capacity_BS.flatten()[None]).view_as(preference_BSR)

    return mock.patch.object(router, "assign_by_position", serve)


def one_process_raises(rank):
    from moe_llm.train import trainer

    def no_step(*arguments):
        raise RuntimeError("no step today")

    return mock.patch.object(trainer, "learning_rate", no_step) if rank is None else contextlib.nullcontext()


# Faults of the package itself: every process has them, so that layouts agree with each other, and only a second opinion
# finds them.


def no_weight_decay(rank):
    from moe_llm.train import build

    real = build.parameter_groups
    return mock.patch.object(build, "parameter_groups", lambda model, decay, *more: real(model, 0.0, *more))


def norms_decay_and_matrices_do_not(rank):
    return _decays_else(lambda group, decay: 0.0 if group["weight_decay"] else decay)


def norms_decay_too(rank):
    return _decays_else(lambda group, decay: decay)


def _decays_else(chosen):
    from moe_llm.train import build

    real = build.parameter_groups

    def groups(model, decay, *more):
        return [{**group, "weight_decay": chosen(group, decay)} for group in real(model, decay, *more)]

    return mock.patch.object(build, "parameter_groups", groups)


def rate_rises_threefold(rank):
    from moe_llm.train import trainer

    real = trainer.learning_rate
    return mock.patch.object(trainer, "learning_rate", lambda config, step, total=None: 3 * real(config, step, total))


def rate_is_multiplied_on_its_way_to_the_optimizer(rank):
    from moe_llm.distributed.engine import _NamedState

    real = _NamedState._before_step
    return mock.patch.object(_NamedState, "_before_step", lambda self, optimizer, lr: real(self, optimizer, 3 * lr))


def warm_up_is_a_step_late(rank):
    from moe_llm.train import trainer

    real = trainer.learning_rate
    return mock.patch.object(
        trainer, "learning_rate", lambda config, step, total=None: real(config, max(0, step - 1), total)
    )


def betas_swapped(rank):
    return _optimizer_with(lambda optim: {"betas": optim.betas[::-1]})


def eps_is_large(rank):
    return _optimizer_with(lambda optim: {"eps": 1e-2})


def _optimizer_with(changes):
    from moe_llm.train import build

    real = build.build_optimizer
    return mock.patch.object(
        build, "build_optimizer", lambda groups, optim: real(groups, optim.model_copy(update=changes(optim)))
    )


def decay_is_added_to_the_gradient(rank):
    from moe_llm.train import build

    def adam(groups, config):
        return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, eps=config.eps)

    return mock.patch.object(build, "build_optimizer", adam)


@contextlib.contextmanager
def clipping_ignored(rank):
    from moe_llm.distributed import deepspeed, engine

    real = deepspeed.engine_config
    with (
        mock.patch.object(torch.nn.utils, "clip_grads_with_norm_", return_value=None),
        mock.patch.object(deepspeed, "engine_config", lambda *a: real(*a) | {"gradient_clipping": 0.0}),
    ):
        assert engine.torch is torch
        yield


def labels_are_the_inputs(rank):
    return _written(lambda out, row: out["labels_BS"].__setitem__(row, out["input_ids_BS"][row]))


def borders_of_documents_are_a_token_late(rank):
    def shift(out, row):
        out["document_ids_BS"][row, 1:] = out["document_ids_BS"][row, :-1].copy()

    return _written(shift)


def positions_go_on_over_documents(rank):
    def count(out, row):
        out["position_ids_BS"][row] = range(out["position_ids_BS"].shape[1])

    return _written(count)


def first_tokens_are_targets(rank):
    def fill(out, row):
        ids, labels = out["input_ids_BS"][row], out["labels_BS"][row]
        lost = (labels[:-1] == -100) & out["attention_mask_BS"][row, 1:]
        labels[:-1][lost] = ids[1:][lost]

    return _written(fill)


def padding_has_targets(rank):
    def fill(out, row):
        out["labels_BS"][row][~out["attention_mask_BS"][row]] = 0

    return _written(fill)


def every_other_target_is_lost(rank):
    def drop(out, row):
        out["labels_BS"][row, ::2] = -100

    return _written(drop)


def _written(change):
    from moe_llm.data.packing import PackedBlocks

    real = PackedBlocks.write

    def write(self, block, row, out):
        real(self, block, row, out)
        change(out, row)

    return mock.patch.object(PackedBlocks, "write", write)


def every_sample_is_the_same_block(rank):
    from moe_llm.data.blocks import TrainBlocks

    def locate(self, start, count):
        return (torch.zeros(count, dtype=torch.int64).numpy(),) * 2

    return mock.patch.object(TrainBlocks, "locate", locate)


def epochs_have_one_order(rank):
    from moe_llm.data import blocks

    real = blocks.shuffled
    return mock.patch.object(blocks, "shuffled", lambda at, length, *a: real(at % length, length, *a))


def the_seed_is_ignored(rank):
    from moe_llm.data import blocks

    real = blocks.shuffled
    return mock.patch.object(blocks, "shuffled", lambda at, length, seed, stream: real(at, length, 0, stream))


def samples_are_drawn_with_replacement(rank):
    from moe_llm.data import blocks

    real = blocks.shuffled
    return mock.patch.object(blocks, "shuffled", lambda at, length, *a: real(at * at, length, *a))


def weights_of_sources_are_ignored(rank):
    from moe_llm.data import order

    real = order.Mixture
    return mock.patch.object(order, "Mixture", lambda weights, seed: real([1.0] * len(weights), seed))


def held_out_text_is_trained_on(rank):
    from moe_llm.data import blocks, loader

    real = loader.load_data

    def load(*arguments, **named):
        data = real(*arguments, **named)
        leaking = blocks.ValidationBlocks(data.train.sources, 8)
        return dataclasses.replace(data, validation=leaking)

    from moe_llm.doctor import observe

    return mock.patch.object(observe, "load_data", load)


def documents_begin_without_bos(rank):
    return _encoded(lambda ids: ids[1:])


def documents_end_without_eos(rank):
    return _encoded(lambda ids: ids[:-1])


def _encoded(change):
    from moe_llm.data.cache import DocumentEncoder

    real = DocumentEncoder.encode
    return mock.patch.object(DocumentEncoder, "encode", lambda self, texts: [change(ids) for ids in real(self, texts)])

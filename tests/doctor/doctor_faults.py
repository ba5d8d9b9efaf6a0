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

    def groups(model, decay):
        left_out = {id(p) for name, p in model.named_parameters() if chosen(name)}
        return [
            {**group, "params": [p for p in group["params"] if id(p) not in left_out]} for group in real(model, decay)
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
    from moe_llm.checkpoint import hf

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
    from moe_llm.distributed import forward_passes

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
    from moe_llm.model.moe import token_choice

    real = token_choice.assign_by_position

    def serve(preference_BSR, groups, top_k, num_experts, capacity_BS, wanted_BSR=None):
        together, every = preference_BSR.flatten(0, 1)[None], token_choice.Groups.of(groups.mask_BS.flatten()[None])
        return real(together, every, top_k, num_experts, capacity_BS.flatten()[None]).view_as(preference_BSR)

    return mock.patch.object(token_choice, "assign_by_position", serve)


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
    return mock.patch.object(build, "parameter_groups", lambda model, decay: real(model, 0.0))


def norms_decay_and_matrices_do_not(rank):
    return _decays_else(lambda group, decay: 0.0 if group["weight_decay"] else decay)


def norms_decay_too(rank):
    return _decays_else(lambda group, decay: decay)


def _decays_else(chosen):
    from moe_llm.train import build

    real = build.parameter_groups

    def groups(model, decay):
        return [{**group, "weight_decay": chosen(group, decay)} for group in real(model, decay)]

    return mock.patch.object(build, "parameter_groups", groups)


def rate_rises_threefold(rank):
    from moe_llm.train import trainer

    real = trainer.learning_rate
    return mock.patch.object(trainer, "learning_rate", lambda config, step: 3 * real(config, step))


def rate_is_multiplied_on_its_way_to_the_optimizer(rank):
    from moe_llm.distributed.engine import _NamedState

    real = _NamedState._before_step
    return mock.patch.object(_NamedState, "_before_step", lambda self, optimizer, lr: real(self, optimizer, 3 * lr))


def warm_up_is_a_step_late(rank):
    from moe_llm.train import trainer

    real = trainer.learning_rate
    return mock.patch.object(trainer, "learning_rate", lambda config, step: real(config, max(0, step - 1)))


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
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", lambda parameters, bound: _norm_of(parameters)),
        mock.patch.object(deepspeed, "engine_config", lambda *a: real(*a) | {"gradient_clipping": 0.0}),
    ):
        assert engine.torch is torch
        yield


def _norm_of(parameters):
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


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
    from moe_llm.data.loader import TrainBlocks

    def locate(self, start, count):
        return (torch.zeros(count, dtype=torch.int64).numpy(),) * 2

    return mock.patch.object(TrainBlocks, "locate", locate)


def epochs_have_one_order(rank):
    from moe_llm.data import loader

    real = loader.shuffled
    return mock.patch.object(loader, "shuffled", lambda at, length, *a: real(at % length, length, *a))


def the_seed_is_ignored(rank):
    from moe_llm.data import loader

    real = loader.shuffled
    return mock.patch.object(loader, "shuffled", lambda at, length, seed, stream: real(at, length, 0, stream))


def samples_are_drawn_with_replacement(rank):
    from moe_llm.data import loader

    real = loader.shuffled
    return mock.patch.object(loader, "shuffled", lambda at, length, *a: real(at * at, length, *a))


def weights_of_sources_are_ignored(rank):
    from moe_llm.data import loader

    real = loader.Mixture
    return mock.patch.object(loader, "Mixture", lambda weights, seed: real([1.0] * len(weights), seed))


def held_out_text_is_trained_on(rank):
    from moe_llm.data import loader

    real = loader.load_data

    def load(*arguments, **named):
        data = real(*arguments, **named)
        leaking = loader.ValidationBlocks(data.train.sources, 8)
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


# What goes wrong in practice.


def _exported(change):
    from moe_llm.checkpoint import hf

    real = hf.to_transformers_config
    return mock.patch.object(hf, "to_transformers_config", lambda *a, **k: change(real(*a, **k)))


def rope_base_lost_on_export(rank):
    return _exported(lambda content: content | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4}})


def window_lost_on_export(rank):
    return _exported(lambda content: content | {"sliding_window": None})


def eos_is_another_token_in_the_model(rank):
    return _exported(lambda content: content | {"eos_token_id": content["eos_token_id"] + 1})


def dtype_of_the_checkpoint_is_misnamed(rank):
    return _exported(lambda content: content | {"dtype": "float16", "torch_dtype": "float16"})


def checkpoint_is_stored_in_another_dtype(rank):
    from moe_llm.train import trainer

    real = trainer.save_checkpoint
    return mock.patch.object(trainer, "save_checkpoint", lambda *a, **k: real(*a, **{**k, "dtype": "bf16"}))


def adapters_are_merged_twice(rank):
    from moe_llm.checkpoint import plan

    real = plan.low_rank_sum
    return mock.patch.object(plan, "low_rank_sum", lambda a, b, scale: real(a, b, 2 * scale))


def the_average_lags_a_step(rank):
    from moe_llm.distributed.averaging import Averaging
    from moe_llm.distributed.engine import LocalEngine

    real_step = LocalEngine.step

    def step(self, lr):
        self.before = [weight.detach().clone() for weight in self._stepped()[1]]
        return real_step(self, lr)

    @torch.no_grad()
    def update(self):
        optimizer, weights = self._stepped()
        self.averaged += 1
        for weight, before in zip(weights, getattr(self, "before", weights)):
            optimizer.state[weight]["ema"] = before.clone()

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(LocalEngine, "step", step))
    stack.enter_context(mock.patch.object(Averaging, "update_average", update))
    return stack


def loss_is_averaged_over_micro_batches(rank):
    from moe_llm.train import trainer

    class PerMicroBatch(trainer.StepLoss):
        def __call__(self, output):
            self.targets = output.num_targets * self.rounds * self.runtime.world_size
            return super().__call__(output)

    return mock.patch.object(trainer, "StepLoss", PerMicroBatch)


def experts_in_no_group_of_any_layout(rank):
    return _everywhere_left_out(lambda name: ".experts." in name)


def norms_in_no_group_of_any_layout(rank):
    return _everywhere_left_out(lambda name: name.endswith("norm.weight"))


def _everywhere_left_out(chosen):
    from moe_llm.train import build

    real = build.parameter_groups

    def groups(model, decay):
        left_out = {id(p) for name, p in model.named_parameters() if chosen(name)}
        return [{**g, "params": [p for p in g["params"] if id(p) not in left_out]} for g in real(model, decay)]

    return mock.patch.object(build, "parameter_groups", groups)


def a_frozen_part_moves(rank):
    from moe_llm.distributed.engine import LocalEngine

    real = LocalEngine.step

    def step(self, lr):
        norm = real(self, lr)
        with torch.no_grad():
            self.model.model.embed_tokens.weight.mul_(1.001)
        return norm

    return mock.patch.object(LocalEngine, "step", step)


# Faults of the model and its losses.


def balance_loss_without_the_number_of_experts(rank):
    from moe_llm.distributed import step_loss

    real = step_loss.balance_loss
    return mock.patch.object(step_loss, "balance_loss", lambda *a, **k: real(*a, **k) / 2)


def z_loss_without_its_square(rank):
    from moe_llm.distributed import step_loss

    real = step_loss.z_loss
    return mock.patch.object(step_loss, "z_loss", lambda *a, **k: real(*a, **k).sqrt())


def weights_of_experts_do_not_sum_to_one(rank):
    from moe_llm.model.moe.routers import mixtral

    return mock.patch.object(mixtral.MixtralRouter, "weights", lambda self, value_TR, shared_TR: value_TR)


def rope_has_another_base(rank):
    from moe_llm.model import decoder

    real = decoder.rotary_cos_sin
    return mock.patch.object(decoder, "rotary_cos_sin", lambda at, dim, base, **k: real(at, dim, base / 10, **k))


def window_is_a_token_too_long(rank):
    from moe_llm.model import decoder

    real = decoder.AttentionPattern.build

    def build(*arguments, sliding_window=None, **named):
        return real(*arguments, sliding_window=None if sliding_window is None else sliding_window + 1, **named)

    return mock.patch.object(decoder.AttentionPattern, "build", build)


def norms_have_another_epsilon(rank):
    from moe_llm.model import decoder

    real = decoder.RMSNorm
    return mock.patch.object(decoder, "RMSNorm", lambda size, eps: real(size, 100 * eps + 1e-3))


# Chat, and dtypes of checkpoints.


def the_end_of_the_turn_is_not_learned(rank):
    """The answer alone is, so that a model never stops."""

    def answer_alone(found, text, span):
        said = found.messages[1]["content"].strip()
        return span[0], text.rindex(said) + len(said)

    return _learned(answer_alone)


def the_question_is_learned_too(rank):
    return _learned(lambda found, text, span: (0, span[1]))


def _learned(changed):
    from moe_llm.data.chat_template import ChatEncoder

    real = ChatEncoder.render

    def render(self, found):
        text, spans = real(self, found)
        return text, [changed(found, text, span) for span in spans]

    return mock.patch.object(ChatEncoder, "render", render)


def the_end_of_the_turn_is_cut_off(rank):
    """It is not even in the tokens."""
    from moe_llm.data.chat_template import ChatEncoder

    real = ChatEncoder.encode

    def encode(self, examples):
        return [(ids[: (last := targets.nonzero()[0][-1])], targets[:last]) for ids, targets in real(self, examples)]

    return mock.patch.object(ChatEncoder, "encode", encode)


def checkpoints_are_loaded_in_another_dtype(rank):
    from moe_llm.distributed.engine import DeepSpeedEngine, LocalEngine

    stack = contextlib.ExitStack()
    for engine in (LocalEngine, DeepSpeedEngine):

        def write(self, name, kind, tensor, real=engine.write):
            real(self, name, kind, tensor.bfloat16().float() if kind == "weight" else tensor)

        stack.enter_context(mock.patch.object(engine, "write", write))
    return stack


# Losses of routers of their own.


def a_variation_is_not_squared(rank):
    from moe_llm.model.moe.routers import noisy_top_k

    real = noisy_top_k.cv_squared
    return mock.patch.object(noisy_top_k, "cv_squared", lambda x_E: (real(x_E) + 1e-12).sqrt())


def groups_of_experts_are_summed_in_place_of_averaged(rank):
    from moe_llm.model.moe.routers import deepseek_moe

    real = deepseek_moe._balance
    return mock.patch.object(
        deepseek_moe, "_balance", lambda s, groups: real(s, groups) * (1 if groups is None else groups)
    )


def entropy_has_another_base(rank):
    from moe_llm.model.moe import losses

    real = losses.mean_entropy
    return mock.patch.object(losses, "mean_entropy", lambda s: real(s) / 0.6931)


def norms_of_heads_are_left_out(rank):
    from moe_llm.model.attention import Attention

    real = Attention.forward

    def forward(self, *arguments):
        norm, self.q_norm = self.q_norm, torch.nn.Identity()
        try:
            return real(self, *arguments) + 0 * norm.weight.sum()
        finally:
            self.q_norm = norm

    return mock.patch.object(Attention, "forward", forward)


def gates_of_shared_experts_stay_open(rank):
    from moe_llm.model.moe.layer import MoELayer

    real = MoELayer.__init__

    def init(self, *arguments, **named):
        real(self, *arguments, **named)
        if self.shared_expert_gate is not None:
            self.shared_expert_gate.register_forward_hook(lambda module, inputs, output: output * 0)

    return mock.patch.object(MoELayer, "__init__", init)

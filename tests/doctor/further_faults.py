"""Faults of all layouts, of kinds that came to mind later than `doctor_faults`' and `practice_faults`'; put in place as those are."""

import contextlib
import dataclasses
import re
from unittest import mock

import torch


def _both_engines(method, change):
    """Wrap a method of one process's engine and of the ranks' engine."""
    from moe_llm.distributed.engine import DeepSpeedEngine, LocalEngine

    stack = contextlib.ExitStack()
    for engine in (LocalEngine, DeepSpeedEngine):
        stack.enter_context(mock.patch.object(engine, method, change(getattr(engine, method))))
    return stack


def bias_correction_is_left_out(rank):
    from moe_llm.train import build

    class Late(torch.optim.AdamW):
        """Counts its steps from a million on, where corrections are 1."""

        def step(self, closure=None):
            for weight in (weight for group in self.param_groups for weight in group["params"]):
                if weight.grad is not None and not self.state[weight]:
                    zeros = {kind: torch.zeros_like(weight) for kind in ("exp_avg", "exp_avg_sq")}
                    self.state[weight].update(step=torch.tensor(1e6), **zeros)
            return super().step(closure)

    def late(groups, config):
        return Late(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    return mock.patch.object(build, "build_optimizer", late)


def the_floor_of_the_cosine_is_lost(rank):
    from moe_llm.train import trainer

    real = trainer.learning_rate

    def rate(config, step, total=None):
        optim = config.optim.model_copy(update={"min_lr_ratio": 0.0})
        return real(config.model_copy(update={"optim": optim}), step, total)

    return mock.patch.object(trainer, "learning_rate", rate)


def gradients_are_clipped_value_by_value(rank):
    from moe_llm.distributed.engine import LocalEngine

    def step(real):
        def clipped(self, lr):
            for parameter in self._trained:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-1e-3, 1e-3)
            return real(self, lr)

        return clipped

    return mock.patch.object(LocalEngine, "step", step(LocalEngine.step))


def the_last_micro_batch_is_dropped(rank):
    from moe_llm.train import trainer

    class Dropping(trainer.StepLoss):
        seen = 0

        def __call__(self, output):
            found = super().__call__(output)
            self.seen += 1
            return found._replace(total=found.total * (self.seen < self.rounds))

    return mock.patch.object(trainer, "StepLoss", Dropping)


def _coefficients(**changed):
    from moe_llm.train import trainer

    class Changed(trainer.StepLoss):
        def __init__(self, model, *more):
            super().__init__(model, *more)
            self.model = model.model_copy(update={key: change(getattr(model, key)) for key, change in changed.items()})

    return mock.patch.object(trainer, "StepLoss", Changed)


def the_balance_losss_coefficient_counts_twice(rank):
    return _coefficients(router_aux_loss_coef=lambda c: 2 * c)


def the_z_loss_is_recorded_and_not_trained(rank):
    return _coefficients(router_z_loss_coef=lambda c: 0.0)


def experts_are_stored_in_another_order(rank):
    """And read in the same, so that no resumed run sees it."""
    from moe_llm.families import hf

    real = hf.pieces

    def neighbour(name):
        return re.sub(r"(experts\.)(\d+)(\.)", lambda found: f"{found[1]}{int(found[2]) ^ 1}{found[3]}", name)

    def pieces(*arguments, **named):
        return [dataclasses.replace(piece, name=neighbour(piece.name)) for piece in real(*arguments, **named)]

    return mock.patch.object(hf, "pieces", pieces)


def scaling_of_rope_lost_on_export(rank):
    from moe_llm.families import hf

    real = hf.to_transformers_config

    def written(*arguments, **named):
        content = real(*arguments, **named)
        plain = {"rope_type": "default", "rope_theta": content["rope_theta"]}
        return content | {"rope_parameters": plain, "rope_scaling": None}

    return mock.patch.object(hf, "to_transformers_config", written)


def documents_begin_a_token_late_in_the_mask(rank):
    from moe_llm.model import decoder

    real = decoder.AttentionPattern.build

    def build(like_BS, *, document_ids=None, **named):
        if document_ids is not None:
            document_ids = torch.cat([document_ids[:, :1], document_ids[:, :-1]], 1)
        return real(like_BS, document_ids=document_ids, **{**named, "runs": None})

    return mock.patch.object(decoder.AttentionPattern, "build", build)


def a_tied_embedding_learns_from_its_output_alone(rank):
    from moe_llm.model import decoder

    real = decoder.Decoder.__init__

    def init(self, *arguments):
        real(self, *arguments)
        self.embed_tokens.forward = lambda ids: torch.nn.functional.embedding(ids, self.embed_tokens.weight.detach())

    return mock.patch.object(decoder.Decoder, "__init__", init)


def the_average_has_another_decay(rank):
    from moe_llm.config.ema import EmaConfig

    def share(self, updates):
        return 0.5 if updates > 1 else 1.0

    return mock.patch.object(EmaConfig, "share", share)


def a_frozen_router_moves(rank):
    def change(real):
        def step(self, lr):
            norm = real(self, lr)
            for entry in self.entries():
                if ".mlp.gate." in entry.name:
                    self.write(entry.name, "weight", self.read(entry.name, "weight") * 1.01)
            return norm

        return step

    return _both_engines("step", change)


def an_expert_gets_no_gradient(rank):
    from moe_llm.train import build

    real = build.build_model

    def cut_off(*arguments, **named):
        model = real(*arguments, **named)
        for name, parameter in model.named_parameters():
            if ".layers.1.mlp.experts.down_proj" in name:
                parameter.register_hook(lambda gradient: torch.cat([gradient[:1] * 0, gradient[1:]]))
        return model

    return mock.patch.object(build, "build_model", cut_off)


def the_last_block_of_an_epoch_is_never_read(rank):
    from moe_llm.data import blocks

    real = blocks.TrainBlocks.__init__

    class Shorter:
        def __init__(self, source):
            self._source = source

        def __len__(self):
            return len(self._source) - 1

        def __getattr__(self, name):
            return getattr(self._source, name)

    def init(self, sources, *arguments, **named):
        real(self, [Shorter(source) for source in sources], *arguments, **named)

    return mock.patch.object(blocks.TrainBlocks, "__init__", init)


def held_out_losses_are_averaged_over_batches(rank):
    """Of each batch the mean, however many targets it has."""
    from moe_llm.evaluation import evaluate

    class EvenSums:
        def __init__(self, engine):
            self._engine = engine

        def __getattr__(self, name):
            return getattr(self._engine, name)

        def forward(self, **inputs):
            output = self._engine.forward(**inputs)
            share = 1 / output.num_targets.clamp(min=1)
            return output._replace(loss_sum=output.loss_sum * share, num_targets=output.num_targets * share)

    from moe_llm.train import trainer

    real = evaluate.validation_loss
    return mock.patch.object(
        trainer, "validation_loss", lambda config, engine, *more: real(config, EvenSums(engine), *more)
    )


def dropout_acts_while_evaluating(rank):
    from moe_llm.model.moe.experts import MoELayer

    real = MoELayer.forward

    def forward(self, x_BSD, *arguments):
        if not self.training:
            drop = torch.rand(x_BSD.shape, generator=torch.Generator().manual_seed(0)) < 0.1
            x_BSD = x_BSD.masked_fill(drop, 0.0)
        return real(self, x_BSD, *arguments)

    return mock.patch.object(MoELayer, "forward", forward)


def schedules_begin_again_with_a_resumed_run(rank):
    from moe_llm.train import trainer

    real = trainer.Trainer.fit

    def fit(self):
        first = self.position.step
        rate = trainer.learning_rate
        with mock.patch.object(
            trainer, "learning_rate", lambda config, step, total=None: rate(config, step - first, total)
        ):
            return real(self)

    return mock.patch.object(trainer.Trainer, "fit", fit)


def moments_begin_again_with_a_resumed_run(rank):
    def change(real):
        def write(self, name, kind, tensor):
            real(self, name, kind, tensor if kind == "weight" else torch.zeros_like(tensor))

        return write

    return _both_engines("write", change)


def initial_weights_are_three_times_as_large(rank):
    from moe_llm.model import init

    real = init._fill_normal
    return mock.patch.object(init, "_fill_normal", lambda tensor, std, key: real(tensor, 3 * std, key))


def every_layer_begins_with_the_same_weights(rank):
    from moe_llm.model import init

    real = init._fill_normal
    return mock.patch.object(
        init, "_fill_normal", lambda tensor, std, key: real(tensor, std, re.sub(r"layers\.\d+", "layers.0", key))
    )


def every_expert_begins_with_the_same_weights(rank):
    from moe_llm.model import init

    real = init._fill_normal
    return mock.patch.object(
        init, "_fill_normal", lambda tensor, std, key: real(tensor, std, re.sub(r"(experts\..*)/\d+", r"\1/0", key))
    )


def all_ranks_draw_the_same_noise(rank):
    from moe_llm.train import trainer

    real = trainer.seed_noise
    return mock.patch.object(trainer, "seed_noise", lambda seed, step, of_rank: real(seed, step, 0))


def noise_is_the_same_in_each_step(rank):
    from moe_llm.train import trainer

    real = trainer.seed_noise
    return mock.patch.object(trainer, "seed_noise", lambda seed, step, of_rank: real(seed, 0, of_rank))


def masters_are_rounded_to_bf16(rank):
    def change(real):
        def step(self, lr):
            norm = real(self, lr)
            for entry in self.entries():
                self.write(entry.name, "weight", self.read(entry.name, "weight").bfloat16().float())
            return norm

        return step

    return _both_engines("step", change)


def adapters_of_experts_count_twice_as_much(rank):
    from moe_llm.model.moe.experts import Experts

    real = Experts.adapt
    return mock.patch.object(
        Experts, "adapt", lambda self, name, rank, scale, dropout: real(self, name, rank, 2 * scale, dropout)
    )

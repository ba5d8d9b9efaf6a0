"""Faults as they happen in practice, of the model, its losses, chat and checkpoints; put in place as `doctor_faults`' are."""

import contextlib
from unittest import mock

import torch

# What goes wrong in practice.


def _exported(change):
    from moe_llm.families import hf

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

    def groups(model, decay, *more):
        left_out = {id(p) for name, p in model.named_parameters() if chosen(name)}
        return [{**g, "params": [p for p in g["params"] if id(p) not in left_out]} for g in real(model, decay, *more)]

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
    from moe_llm.model.moe.experts import MoELayer

    real = MoELayer.__init__

    def init(self, *arguments, **named):
        real(self, *arguments, **named)
        if self.shared_expert_gate is not None:
            self.shared_expert_gate.register_forward_hook(lambda module, inputs, output: output * 0)

    return mock.patch.object(MoELayer, "__init__", init)


def biases_move_the_wrong_way(rank):
    import model_faults

    return model_faults.biases_move_towards_the_load()

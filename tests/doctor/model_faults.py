"""Faults of routers and of parts of decoders, which every layout shares, as context managers."""

from unittest import mock

import torch


def biases_move_towards_the_load():
    from moe_llm.model.moe.routers.bias_balanced import BiasBalancedRouter

    def after_step(self, total):
        counts_E = total.tokens_per_expert_E
        self.e_score_correction_bias -= self.settings.update_rate * (counts_E.mean() - counts_E).sign()

    return mock.patch.object(BiasBalancedRouter, "after_step", after_step)


def a_group_is_as_good_as_its_best_expert():
    from moe_llm.model.moe.routers import bias_balanced

    real = bias_balanced.close_groups

    def close(score_TE, score_TG, allowed):
        return real(score_TE, score_TE.unflatten(-1, (score_TG.shape[-1], -1)).amax(-1), allowed)

    return mock.patch.object(bias_balanced, "close_groups", close)


def thresholds_are_sums_in_place_of_means():
    from moe_llm.model.moe.routers.expert_choice import ExpertChoiceRouter

    real = ExpertChoiceRouter.after_step

    def after_step(self, total):
        extra_X = torch.cat([total.extra_X[:-1], torch.ones(1)])
        real(self, total._replace(extra_X=extra_X))

    return mock.patch.object(ExpertChoiceRouter, "after_step", after_step)


def experts_take_a_token_less():
    from moe_llm.model.moe.capacity import Groups

    real = Groups.capacity
    return mock.patch.object(Groups, "capacity", lambda self, *a: real(self, *a) - 1)


def positions_count_over_documents():
    return _groups_without_documents("balanced")


def gates_read_other_documents():
    from moe_llm.model.moe.routers.transformer import TransformerRouter

    real = TransformerRouter._seen
    return mock.patch.object(TransformerRouter, "_seen", lambda self, mask_BS, document_BS: real(self, mask_BS, None))


def segments_go_over_documents():
    from moe_llm.model.moe.routers import soft_moe

    real = soft_moe.segments
    return mock.patch.object(soft_moe, "segments", lambda mask_BS, document_BS, length: real(mask_BS, None, length))


def the_first_segment_is_routed_like_a_later_one():
    from moe_llm.model.moe.segments import Segments

    real = Segments.cut

    def cut(*arguments):
        found = real(*arguments)
        return found._replace(opens_BG=torch.zeros_like(found.opens_BG))

    return mock.patch.object(Segments, "cut", cut)


def what_is_drawn_is_put_back():
    from moe_llm.model.moe.routers import reinforce

    return mock.patch.object(
        reinforce, "log_probability", lambda l_TE, e_TK: l_TE.log_softmax(-1).gather(1, e_TK).sum(1)
    )


def the_baseline_looks_at_the_token_itself():
    from moe_llm.model.moe.feedback import TokenLosses

    real = TokenLosses.mean_before

    def mean(self, value_T):
        _, known_T = real(self, value_T)
        return value_T / 2, known_T

    return mock.patch.object(TokenLosses, "mean_before", mean)


def the_posterior_knows_no_likelihood():
    from moe_llm.model.moe.routers import em

    return mock.patch.object(em, "responsibilities", lambda log_gate_TE, loss_TE, hard: log_gate_TE.detach().exp())


def parts_are_merged_in_another_order():
    from moe_llm.model.moe.routers.multi_head import MultiHeadRouter

    real = MultiHeadRouter.__init__

    def init(self, config):
        real(self, config)
        self.merge_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0].roll(1, -1),))

    return mock.patch.object(MultiHeadRouter, "__init__", init)


def shared_experts_count_twice():
    from moe_llm.model.moe.experts import MoELayer

    real = MoELayer._shared
    return mock.patch.object(MoELayer, "_shared", lambda self, x_TD: 2 * real(self, x_TD))


def activations_are_not_clamped():
    from moe_llm.model.moe import experts

    real = experts.formed_expert_mlp

    def mlp(x, gate_up, down, counts, form, **named):
        return real(x, gate_up, down, counts, form._replace(limit=1e9), **named)

    return mock.patch.object(experts, "formed_expert_mlp", mlp)


def sinks_take_nothing():
    from moe_llm.model import attention

    real = attention.attention_with_sinks
    return mock.patch.object(
        attention, "attention_with_sinks", lambda q, k, v, sinks_H, pattern: real(q, k, v, sinks_H - 50, pattern)
    )


def scores_of_latent_heads_have_the_width_of_a_value():
    from moe_llm.model.attention import LatentAttention

    real = LatentAttention.__init__

    def init(self, config):
        real(self, config)
        self.query_scale *= (self.head_dim / self.value_dim) ** 0.5

    return mock.patch.object(LatentAttention, "__init__", init)


def whole_heads_are_turned():
    from moe_llm.config.rope import RopeParameters
    from moe_llm.model import decoder

    real = decoder.rotary_cos_sin
    return mock.patch.object(decoder, "rotary_cos_sin", lambda *a, **k: real(*a, **{**k, "rope": RopeParameters()}))


def _groups_without_documents(name):
    import importlib

    module = importlib.import_module(f"moe_llm.model.moe.routers.{name}")
    real = module.Groups.of

    class WithoutDocuments:
        of = staticmethod(lambda mask_BS, document_BS=None: real(mask_BS, None))

    return mock.patch.object(module, "Groups", WithoutDocuments)

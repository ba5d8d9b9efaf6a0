"""Tokens of given sources to given experts while training (`finetune.expert_sources`)."""

import torch

from moe_llm.config import Config
from moe_llm.errors import UserError
from moe_llm.families.architectures import takes_top_k
from moe_llm.train.callbacks.base import Callback, TrainingRun


class ExpertSources(Callback):
    """Tells the model which experts each source's tokens may have; others are out of the router's softmax for them."""

    def validate(self, config: Config) -> None:
        """Refuse lists that do not fit the sources or the model, and routers whose tokens choose no fixed number."""
        given, model = config.finetune.expert_sources, config.model
        assert given is not None, "this callback belongs to runs that send sources to experts"
        if len(given) != len(config.data.sources):
            raise UserError(
                f"finetune.expert_sources has {len(given)} entries for {len(config.data.sources)} data.sources: give one "
                "for each, null where its tokens may go to all experts"
            )
        if not takes_top_k(model):
            raise UserError(
                f"finetune.expert_sources sends tokens to their top k of some experts, and model.router.type="
                f"{model.router.type} gives them other ones: use another type, or remove it"
            )
        for index, experts in enumerate(given):
            if experts is None:
                continue
            key = f"finetune.expert_sources.{index}={experts}"
            for expert in experts:
                if not 0 <= expert < model.num_local_experts:
                    raise UserError(
                        f"{key} names expert {expert}, and model.num_local_experts={model.num_local_experts}: use "
                        f"indices from 0 to {model.num_local_experts - 1}"
                    )
            if len(set(experts)) < model.num_experts_per_tok:
                raise UserError(
                    f"{key} names fewer than model.num_experts_per_tok={model.num_experts_per_tok} experts: name more"
                )

    def on_setup(self, run: TrainingRun) -> None:
        given, experts = run.config.finetune.expert_sources, run.config.model.num_local_experts
        assert given is not None
        allowed_XE = torch.zeros(len(given), experts, dtype=torch.bool)
        for source, some in enumerate(given):
            allowed_XE[source, slice(None) if some is None else some] = True
        run.engine.model.source_experts_XE = allowed_XE

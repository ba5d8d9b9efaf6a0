"""Settings of routers whose experts work on something else than tokens, by `model.router.type`."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from moe_llm.config.base import invalid
from moe_llm.config.router_base import ModelSizes, OverflowSettings, RouterSettings, Shapes


class SoftMoESettings(RouterSettings):
    """Slots, each a mean of the tokens of a segment; a token takes a mean of what experts made of the slots of the
    segment before (after Puigcerver et al. 2023)."""

    type: Literal["soft_moe"] = "soft_moe"
    aux_loss_coef: ClassVar[float] = 0.0
    slots_per_expert: int = Field(ge=1, description="slots of each expert for each segment")
    segment_length: int = Field(
        ge=1,
        description="tokens that form slots together, which those of the next segment of the document take from; "
        "the first segment's have no expert",
    )
    normalize: bool = Field(
        True, description="tokens and slots' parameters are of length 1 in the logits, which get a learned factor"
    )
    needs_past: ClassVar[bool] = True
    spreads: ClassVar[bool] = False

    def check(self, model: ModelSizes) -> None:
        if self.slots_per_expert > self.segment_length:
            invalid(
                "router.slots_per_expert",
                self.slots_per_expert,
                f"is more than the segment_length={self.segment_length} tokens that they are means of",
                "lower it",
            )
        rows = _rows(model.num_local_experts, self.slots_per_expert, self.segment_length)
        if model.num_experts_per_tok != rows:
            slots = model.num_local_experts * self.slots_per_expert
            invalid(
                "num_experts_per_tok",
                model.num_experts_per_tok,
                f"is not what {slots} slots for each model.router.segment_length={self.segment_length} tokens make",
                f"set it to {rows}, or change model.router.slots_per_expert",
            )
        if self.segment_length >= model.max_position_embeddings:
            invalid(
                "router.segment_length",
                self.segment_length,
                f"leaves no second segment in max_position_embeddings={model.max_position_embeddings}",
                "lower it",
            )

    def check_length(self, length: int) -> None:
        check_second_segment(self.segment_length, length)

    def shrunk(self, model: ModelSizes, experts: int, length: int) -> dict[str, Any]:
        segment = min(self.segment_length, max(1, length // 5))
        slots = max(1, round(self.slots_per_expert * segment / self.segment_length))
        return {
            "num_experts_per_tok": _rows(experts, slots, segment),
            "router": {"segment_length": segment, "slots_per_expert": slots},
        }

    def mixed_per_token(self, model: ModelSizes) -> int:
        return 2 * model.num_local_experts * self.slots_per_expert * model.hidden_size  # into slots and out of them

    def entered_per_token(self, model: ModelSizes) -> float:
        slots = model.num_local_experts * self.slots_per_expert  # logits, and each softmax with what it is of
        rows = slots / self.segment_length  # and what they give, beside tokens by segment and their outputs
        return 5 * slots + (2 * rows + 2) * model.hidden_size

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        weight = {"weight": (model.num_local_experts * self.slots_per_expert, model.hidden_size)}
        return weight | ({"scale": (1,)} if self.normalize else {})


class MultiHeadSettings(OverflowSettings):
    """Each token is split into parts that are routed apart, between two linear maps (MH-MoE, Wu et al. 2024)."""

    type: Literal["multi_head"] = "multi_head"
    aux_loss_coef: ClassVar[float] = 0.01
    heads: int = Field(
        ge=2,
        description="parts of a token, each of width hidden_size / heads, which is that of what experts take and "
        "give; each goes to model.num_experts_per_tok of them",
    )
    norm_topk_prob: bool = Field(False, description="weights of a part's experts are divided by their sum")

    def check(self, model: ModelSizes) -> None:
        if model.hidden_size % self.heads:
            invalid("router.heads", self.heads, f"does not divide hidden_size={model.hidden_size}", "use a divisor")

    def active_experts(self, model: ModelSizes) -> int:
        return model.num_experts_per_tok * self.heads

    def entered_per_token(self, model: ModelSizes) -> float:
        return 2 * model.hidden_size

    @property
    def normalized(self) -> bool:
        return self.norm_topk_prob

    @property
    def parts_per_token(self) -> int:  # type: ignore[override]
        return self.heads

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        square = (model.hidden_size, model.hidden_size)
        return {
            "weight": (model.num_local_experts, model.expert_hidden_size),
            "head_proj.weight": square,
            "merge_proj.weight": square,
        }


def check_second_segment(segment: int, length: int) -> None:
    """Refuse blocks of so many tokens in which no segment has one before it, and what that decides is not trained."""
    if segment >= length:
        invalid(
            "model.router.segment_length",
            segment,
            f"leaves no second segment in data.sequence_length={length}",
            "lower the one or raise the other",
        )


def _rows(experts: int, slots: int, segment: int) -> int:
    """Rows of experts that a token costs, rounded up."""
    return -(-experts * slots // segment)

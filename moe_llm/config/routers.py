"""How tokens choose experts: the settings of each router, by `model.router.type`.

One class of settings for each router in `moe_llm.model.moe.routers`, and one line for it in `ROUTER_SETTINGS`. A router
that is defined elsewhere adds its own with `moe_llm.model.moe.routers.register`.
"""

import difflib
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from moe_llm.config.base import fields_by_key, invalid
from moe_llm.config.router_base import (
    CAPACITY,
    DEFAULT_TYPE,
    ENTROPY_COEFFICIENTS,
    LimitedSettings,
    ModelSizes,
    OverflowSettings,
    RouterSettings,
    Shapes,
    check_sizes,
)
from moe_llm.config.routers_learned import AttentionSettings, EMSettings, ReinforceSettings, TransformerSettings
from moe_llm.config.routers_mixed import MultiHeadSettings, SoftMoESettings, check_second_segment

__all__ = [
    "DEFAULT_TYPE",
    "ENTROPY_COEFFICIENTS",
    "ROUTER_SETTINGS",
    "AnyRouterSettings",
    "LimitedSettings",
    "OverflowSettings",
    "RouterSettings",
    "Shapes",
]


class MixtralSettings(OverflowSettings):
    """Softmax over the experts, the top k of it, renormalised (Jiang et al. 2024)."""

    type: Literal["mixtral"] = Field("mixtral", description="mixtral: softmax, top-k, renormalised")
    bias: bool = Field(False, description="each expert's logit has a trained bias, as in GPT-OSS")

    @property
    def normalized(self) -> bool:
        return True

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        bias = {"bias": (model.num_local_experts,)} if self.bias else {}
        return {**super().parameter_shapes(model), **bias}

    def unweighed(self, model: ModelSizes) -> list[str]:
        unweighed = super().unweighed(model)
        return [*unweighed, "bias"] if unweighed and self.bias else unweighed


class DenseSettings(RouterSettings):
    """Every expert, weighted by the softmax: the original mixture (Jacobs, Jordan, Nowlan and Hinton 1991)."""

    type: Literal["dense"] = "dense"
    aux_loss_coef: ClassVar[float] = 0.0

    def check(self, model: ModelSizes) -> None:
        if model.num_experts_per_tok != model.num_local_experts:
            invalid(
                "num_experts_per_tok",
                model.num_experts_per_tok,
                "is not all experts, which model.router.type=dense gives to each token",
                f"set it to num_local_experts={model.num_local_experts}",
            )


class NoisyTopKSettings(OverflowSettings):
    """Learned noise, then the top k before the softmax, with importance and load losses (Shazeer et al. 2017)."""

    type: Literal["noisy_top_k"] = "noisy_top_k"
    aux_loss_coef: ClassVar[float] = 0.0
    importance_coef: float = Field(0.1, ge=0, description="weight of CV^2 of the gates' sums over tokens (equation 7)")
    load_coef: float = Field(0.1, ge=0, description="weight of CV^2 of the expected numbers of tokens (equation 11)")
    noise: bool = Field(True, description="false: nothing is drawn while training, as in evaluation")

    @property
    def normalized(self) -> bool:
        return True

    def unweighed(self, model: ModelSizes) -> list[str]:
        return [*super().unweighed(model), "noise_weight"] if model.num_experts_per_tok == 1 else []

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        shape = (model.num_local_experts, model.hidden_size)
        return {"weight": shape, "noise_weight": shape}

    def quiet(self) -> dict[str, Any]:
        return {**super().quiet(), "noise": False}


class GShardSettings(LimitedSettings):
    """Top 2 with limited room; the second expert at random, in proportion to its weight (Lepikhin et al. 2020)."""

    type: Literal["gshard"] = "gshard"
    aux_loss_coef: ClassVar[float] = 0.01
    capacity_factor: float | None = Field(
        1.25,
        gt=0,
        description=CAPACITY,
    )
    second_expert: Literal["random", "always"] = Field(
        "random", description="random: while training, with probability min(1, 2 * its weight)"
    )

    @property
    def even(self) -> bool:
        return super().even and self.second_expert == "always"

    def check(self, model: ModelSizes) -> None:
        _exactly(model, 2, self.type)

    def quiet(self) -> dict[str, Any]:
        return {**super().quiet(), "second_expert": "always"}


class SwitchSettings(OverflowSettings):
    """The one likeliest expert with limited room, its probability as weight (Fedus et al. 2021)."""

    type: Literal["switch"] = "switch"
    aux_loss_coef: ClassVar[float] = 0.01
    capacity_factor: float | None = Field(
        1.25,
        gt=0,
        description=CAPACITY,
    )

    def check(self, model: ModelSizes) -> None:
        _exactly(model, 1, self.type)


class BatchPrioritisedSettings(OverflowSettings):
    """Top k with their probabilities as weights; where room is short, tokens of high score come first (Riquelme et al.
    2021)."""

    type: Literal["batch_prioritised"] = "batch_prioritised"
    aux_loss_coef: ClassVar[float] = 0.01
    capacity_factor: float | None = Field(
        1.05,
        gt=0,
        description=CAPACITY,
    )
    score: Literal["max", "sum"] = Field("max", description="of a token: its largest weight, or the sum of its top k")
    noise: bool = Field(True, description="while training, logits get normal noise of deviation 1 / experts")
    capacity_order: str = Field(
        "score", pattern="^score$", description="who gets the room: first choices first, among them by score"
    )

    def quiet(self) -> dict[str, Any]:
        return {**super().quiet(), "noise": False}


class TopPSettings(RouterSettings):
    """As many experts as it takes for their probabilities to reach p (Huang et al. 2024)."""

    type: Literal["top_p"] = "top_p"
    aux_loss_coef: ClassVar[float] = 0.01
    p: float = Field(
        0.4,
        gt=0,
        le=1,
        description="sum of probabilities that a token's experts reach; no token has more than "
        "model.num_experts_per_tok",
    )
    local_entropy_coef: float = Field(
        1e-4,
        ge=0,
        description="weight of the mean entropy of a token's distribution, which keeps the number of experts small",
    )

    @property
    def even(self) -> bool:
        return False


class HierarchicalSettings(RouterSettings):
    """Groups of experts first, then experts within the chosen groups (Jordan and Jacobs 1994; Shazeer et al. 2017,
    appendix B)."""

    type: Literal["hierarchical"] = "hierarchical"
    groups: int = Field(ge=2, description="groups of neighbouring experts, of equal size")
    groups_per_token: int = Field(
        1,
        ge=1,
        description="groups that a token passes through; each gives "
        "model.num_experts_per_tok / groups_per_token experts",
    )

    def check(self, model: ModelSizes) -> None:
        experts, chosen = model.num_local_experts, model.num_experts_per_tok
        if experts % self.groups:
            invalid("router.groups", self.groups, f"does not divide num_local_experts={experts}", "use a divisor")
        if self.groups_per_token > self.groups:
            invalid("router.groups_per_token", self.groups_per_token, f"is above groups={self.groups}", "lower it")
        if chosen % self.groups_per_token:
            invalid(
                "router.groups_per_token",
                self.groups_per_token,
                f"does not divide num_experts_per_tok={chosen}",
                "use a divisor",
            )
        if chosen // self.groups_per_token > experts // self.groups:
            invalid(
                "num_experts_per_tok",
                chosen,
                f"asks {chosen // self.groups_per_token} experts of each group of {experts // self.groups}",
                "lower it, or raise model.router.groups_per_token",
            )

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        return {
            "weight": (model.num_local_experts, model.hidden_size),
            "group_weight": (self.groups, model.hidden_size),
        }

    def unweighed(self, model: ModelSizes) -> list[str]:
        alone = {"group_weight": self.groups_per_token, "weight": model.num_experts_per_tok // self.groups_per_token}
        return [name for name, number in alone.items() if number == 1]


class DeepSeekMoESettings(OverflowSettings):
    """Softmax, top k, with losses that balance experts and groups of them (DeepSeekMoE, Dai et al. 2024)."""

    type: Literal["deepseek_moe"] = "deepseek_moe"
    aux_loss_coef: ClassVar[float] = 0.0
    norm_topk_prob: bool = Field(False, description="weights of a token's experts are divided by their sum")
    routed_scaling_factor: float = Field(1.0, gt=0, description="what weights are multiplied by then")
    expert_balance_coef: float = Field(
        0.01, ge=0, description="weight of the expert-level balance loss (equations 12 to 14), 1 when balanced"
    )
    device_balance_coef: float = Field(
        0.0, ge=0, description="weight of the same over groups of experts, the device-level one (equations 15 and 16)"
    )
    device_groups: int | None = Field(
        None,
        ge=2,
        description="groups of neighbouring experts, of equal size, for that; they need not be those of the ranks",
    )

    n_group: int = Field(1, ge=1, description="groups of neighbouring experts, of equal size, for topk_group")
    topk_group: int = Field(
        1,
        ge=1,
        description="groups that a token may take experts from: those with the likeliest single expert (group-limited "
        "routing, DeepSeek-V2 2024, section 2.2.2)",
    )

    @property
    def normalized(self) -> bool:
        return self.norm_topk_prob

    def check(self, model: ModelSizes) -> None:
        experts = model.num_local_experts
        _check_groups(self, model)
        if self.device_groups is None and self.device_balance_coef:
            invalid(
                "router.device_balance_coef",
                self.device_balance_coef,
                "has no groups to balance",
                "set model.router.device_groups",
            )
        if self.device_groups is not None and not self.device_balance_coef:
            invalid(
                "router.device_groups",
                self.device_groups,
                "is for model.router.device_balance_coef=0",
                "set that, or remove it",
            )
        if self.device_groups is not None and experts % self.device_groups:
            invalid(
                "router.device_groups",
                self.device_groups,
                f"does not divide num_local_experts={experts}",
                "use a divisor",
            )


class BiasBalancedSettings(RouterSettings):
    """A bias on each expert's score, in selection alone, is moved against its load after each step (Wang et al. 2024;
    DeepSeek-V3 2024)."""

    type: Literal["bias_balanced"] = "bias_balanced"
    aux_loss_coef: ClassVar[float] = 0.0
    score: Literal["sigmoid", "softmax"] = Field("sigmoid", description="of the router's logits")
    update_rate: float = Field(
        0.001,
        ge=0,
        description="what an expert's bias is raised or lowered by after a step in which it had less or "
        "more than its even share",
    )
    loss_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="of an expert's load, the part that goes by its tokens' share of all tokens' losses; the rest goes by "
        "their number. Above 0 the bias moves in proportion to what the load is beyond the even one, by at most update_rate",
    )
    time_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="with model.expert_sizes, the part of an expert's load that goes by the time that its tokens take: their "
        "number times its width, which is exact after a resume, as a clock is not; above 0 the bias moves as with loss_share",
    )
    norm_topk_prob: bool = Field(True, description="weights of a token's experts are divided by their sum")
    routed_scaling_factor: float = Field(1.0, gt=0, description="what weights are multiplied by then")
    n_group: int = Field(1, ge=1, description="groups of neighbouring experts, of equal size")
    topk_group: int = Field(
        1, ge=1, description="groups that a token may take experts from: those whose two best scores are highest in sum"
    )

    @property
    def normalized(self) -> bool:
        return self.norm_topk_prob

    @property
    def learns_from_loss(self) -> bool:  # type: ignore[override]
        return self.loss_share > 0

    @property
    def spreads(self) -> bool:  # type: ignore[override]
        return not self.learns_from_loss

    def buffer_shapes(self, model: ModelSizes) -> Shapes:
        return {"e_score_correction_bias": (model.num_local_experts,)}

    def check(self, model: ModelSizes) -> None:
        experts, size = model.num_local_experts, model.num_local_experts // self.n_group
        check_sizes("router.time_share", self.time_share, model)
        if self.loss_share + self.time_share > 1:
            taken = f"and time_share={self.time_share:g} are more than all of the load"
            invalid("router.loss_share", self.loss_share, taken, "let them sum to 1 at most")
        if self.n_group > 1 and size < 2:
            invalid(
                "router.n_group",
                self.n_group,
                f"leaves one of num_local_experts={experts} in each group, and a group's score is that of two",
                "lower it",
            )
        _check_groups(self, model)


class BalancedSettings(RouterSettings):
    """Experts by position, round and round, with the router's weights: for benchmarks, where every expert shall have
    the same work."""

    type: Literal["balanced"] = "balanced"
    aux_loss_coef: ClassVar[float] = 0.0

    @property
    def normalized(self) -> bool:
        return True


class LorySettings(RouterSettings):
    """Experts' weights are mixed, segment by segment, by the mean of the segment before (Lory, Zhong et al. 2024)."""

    type: Literal["lory"] = "lory"
    aux_loss_coef: ClassVar[float] = 0.0
    segment_length: int = Field(256, ge=1, description="tokens that pass through the same mixture")
    merges: ClassVar[bool] = True
    spreads: ClassVar[bool] = False

    def check(self, model: ModelSizes) -> None:
        _exactly(model, 1, self.type)  # the one of mixed weights
        if self.segment_length >= model.max_position_embeddings:
            invalid(
                "router.segment_length",
                self.segment_length,
                f"leaves no second segment in max_position_embeddings={model.max_position_embeddings}",
                "lower it",
            )

    def check_length(self, length: int) -> None:
        check_second_segment(self.segment_length, length)

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        return {**super().parameter_shapes(model), "start": (model.num_local_experts,)}

    def mixed_per_token(self, model: ModelSizes) -> float:
        return model.num_local_experts * model.expert_parameters / self.segment_length

    def shrunk(self, model: ModelSizes, experts: int, length: int) -> dict[str, Any]:
        return {"router": {"segment_length": min(self.segment_length, max(1, length // 4))}}


class ExpertChoiceSettings(RouterSettings):
    """Experts take the tokens of a sequence that score highest for them, a token any number of experts (Zhou et al.
    2022)."""

    type: Literal["expert_choice"] = "expert_choice"
    aux_loss_coef: ClassVar[float] = 0.0
    capacity_factor: float = Field(
        1.0,
        gt=0,
        description="an expert takes this many times its even share of each document or block, while training: the "
        "paper's capacity factor c, experts of a token on average, is this times model.num_experts_per_tok",
    )
    threshold_rate: float = Field(
        0.05,
        gt=0,
        le=1,
        description="share of the way that each step moves an expert's threshold, which decides in "
        "evaluation, to the lowest probability that it took in that step",
    )
    causal: ClassVar[bool] = False
    looks_ahead: ClassVar[str] = "experts take the best tokens of a whole sequence"
    evaluates_by_buffers: ClassVar[bool] = True
    afterwards: ClassVar[str] = "send a token to each expert whose threshold its probability reaches, perhaps to none"

    def check(self, model: ModelSizes) -> None:
        average = self.capacity_factor * model.num_experts_per_tok
        if average > model.num_local_experts:
            invalid(
                "router.capacity_factor",
                self.capacity_factor,
                f"asks {average:g} experts a token of num_local_experts={model.num_local_experts}",
                "lower it",
            )

    def buffer_shapes(self, model: ModelSizes) -> Shapes:
        return {"threshold": (model.num_local_experts,)}

    def active_experts(self, model: ModelSizes) -> int:
        return math.ceil(self.capacity_factor * model.num_experts_per_tok)

    @property
    def even(self) -> bool:
        return False


def _check_groups(settings: "BiasBalancedSettings | DeepSeekMoESettings", model: ModelSizes) -> None:
    experts, groups, allowed = model.num_local_experts, settings.n_group, settings.topk_group
    if experts % groups:
        invalid("router.n_group", groups, f"does not divide num_local_experts={experts}", "use a divisor")
    if allowed > groups:
        invalid("router.topk_group", allowed, f"is above n_group={groups}", "lower it")
    if model.num_experts_per_tok > allowed * (experts // groups):
        invalid(
            "num_experts_per_tok",
            model.num_experts_per_tok,
            f"is above the {allowed * (experts // groups)} experts of model.router.topk_group={allowed} groups",
            "lower it, or raise model.router.topk_group",
        )


def _exactly(model: ModelSizes, experts: int, kind: str) -> None:
    if model.num_experts_per_tok != experts:
        invalid(
            "num_experts_per_tok",
            model.num_experts_per_tok,
            f"does not fit model.router.type={kind}",
            f"set it to {experts}",
        )


ROUTER_SETTINGS: dict[str, type[RouterSettings]] = {
    "mixtral": MixtralSettings,
    "dense": DenseSettings,
    "noisy_top_k": NoisyTopKSettings,
    "gshard": GShardSettings,
    "switch": SwitchSettings,
    "batch_prioritised": BatchPrioritisedSettings,
    "top_p": TopPSettings,
    "hierarchical": HierarchicalSettings,
    "balanced": BalancedSettings,
    "deepseek_moe": DeepSeekMoESettings,
    "bias_balanced": BiasBalancedSettings,
    "soft_moe": SoftMoESettings,
    "multi_head": MultiHeadSettings,
    "lory": LorySettings,
    "expert_choice": ExpertChoiceSettings,
    "attention": AttentionSettings,
    "transformer": TransformerSettings,
    "reinforce": ReinforceSettings,
    "em": EMSettings,
}


def _settings(value: Any) -> Any:
    """The settings that a mapping describes, by its `type`; keys of other types are refused by name."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type", DEFAULT_TYPE)
    if not isinstance(kind, str) or kind not in ROUTER_SETTINGS:
        near = difflib.get_close_matches(str(kind), ROUTER_SETTINGS, n=1)
        invalid(
            "type",
            kind,
            "is no known router",
            (f"did you mean {near[0]}?" if near else f"use one of {', '.join(ROUTER_SETTINGS)}")
            + f"{' If' if near else '; if'} it is your own, run the command by a script that imports its module, as "
            "docs/guides/own-router.md shows",
        )
    known = fields_by_key(ROUTER_SETTINGS[kind])
    for key in value:
        if key not in known:
            owners = [other for other, settings in ROUTER_SETTINGS.items() if key in fields_by_key(settings)]
            if owners:
                problem = f"is no setting of type {kind} but of {', '.join(owners)}"
                invalid(str(key), value[key], problem, "remove it, or change the type")
            raise PydanticCustomError("unknown_key", "unknown key", {"key": str(key), "known": list(known)})
    return ROUTER_SETTINGS[kind].model_validate(value)


class _AnyRouter:
    """The JSON schema of the settings: one of the registered ones."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [settings.model_json_schema() for settings in ROUTER_SETTINGS.values()]}


AnyRouterSettings = Annotated[SerializeAsAny[RouterSettings], BeforeValidator(_settings), _AnyRouter()]

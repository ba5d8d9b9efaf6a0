"""How tokens choose experts: the settings of each router, by `model.router.type`.

One class of settings for each router in `moe_llm.model.moe.routers`, and one line for it in `ROUTER_SETTINGS`. A router
that is defined elsewhere adds its own with `moe_llm.model.moe.routers.register`.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError

from moe_llm.config.base import Section, fields_by_key, invalid

if TYPE_CHECKING:
    from moe_llm.config.model import ModelConfig

DEFAULT_TYPE = "mixtral"
Shapes = dict[str, tuple[int, ...]]
ENTROPY_COEFFICIENTS = ("entropy_bonus_coef", "local_entropy_coef", "global_entropy_coef")


class RouterSettings(Section):
    """How tokens choose experts. Each type has settings of its own besides these."""

    type: str = Field(DEFAULT_TYPE, description="which router; the types and their settings are below")
    entropy_bonus_coef: float = Field(
        0.0, ge=0, description="weight of minus the mean entropy of a token's distribution over experts: keeps routers "
        "from deciding too early",
    )
    local_entropy_coef: float = Field(
        0.0, ge=0, description="weight of that mean entropy: makes routers decide (LIMoE's local loss, Mustafa et al. "
        "2022, section 2.2)",
    )
    global_entropy_coef: float = Field(
        0.0, ge=0, description="weight of minus the entropy of the mean distribution: keeps all experts in use "
        "(LIMoE's global loss)",
    )
    global_entropy_threshold: float | None = Field(
        None, gt=0, description="nats up to which the global loss raises that entropy, max(0, this - entropy); null: "
        "without end",
    )

    causal: ClassVar[bool] = True  # whether, in training too, a token's experts depend on no later token

    @model_validator(mode="after")
    def _entropies_agree(self):
        if self.entropy_bonus_coef and self.local_entropy_coef:
            invalid("entropy_bonus_coef", self.entropy_bonus_coef,
                    f"pulls against local_entropy_coef={self.local_entropy_coef:g}", "set one of them to 0")
        if self.global_entropy_threshold is not None and not self.global_entropy_coef:
            invalid("global_entropy_threshold", self.global_entropy_threshold,
                    "applies to nothing without global_entropy_coef", "set that, or remove it")
        return self

    def check(self, model: "ModelConfig") -> None:
        """Refuse, with `invalid`, a model that this router does not fit; fields are relative to `model`."""

    def parameter_shapes(self, model: "ModelConfig") -> Shapes:
        """The parameters of one layer's router, by name."""
        return {"weight": (model.num_local_experts, model.hidden_size)}

    def buffer_shapes(self, model: "ModelConfig") -> Shapes:
        """What of one layer's router is no parameter but belongs to the model: fp32, begins at zero, is changed by
        the router's `after_step` alone, and is in every checkpoint."""
        return {}

    def active_experts(self, model: "ModelConfig") -> int:
        """How many experts a token passes through, at most."""
        return model.num_experts_per_tok

    @property
    def even(self) -> bool:
        """Whether every token has exactly `active_experts` rows while training."""
        return True

    @property
    def limited(self) -> bool:
        """Whether experts may turn tokens away while training."""
        return False

    def unlimited(self) -> dict[str, Any]:
        """Changes of settings under which none does."""
        return {}

    def quiet(self) -> dict[str, Any]:
        """Changes of settings under which nothing is drawn at random, so that training does not depend on how the
        tokens lie on ranks."""
        return {}


class LimitedSettings(RouterSettings):
    """Routers whose tokens choose experts that may have limited room."""

    capacity_factor: float | None = Field(
        None, gt=0,
        description="an expert takes at most this many times its even share of each sequence, while training; "
        "null: no limit",
    )
    initial_capacity_factor: float | None = Field(
        None, gt=0, description="the factor at the first step, from which it goes to `capacity_factor` linearly; null: "
        "that from the start",
    )
    capacity_decay_steps: int = Field(0, ge=0, description="optimizer steps that this takes")
    warmup_steps: int = Field(
        0, ge=0, description="steps in which a token's experts are drawn at random with a probability that falls from "
        "1 to 0; their weights are the router's",
    )

    @model_validator(mode="after")
    def _schedule_is_whole(self):
        if (self.initial_capacity_factor is None) != (self.capacity_decay_steps == 0):
            missing = "capacity_decay_steps" if self.initial_capacity_factor is not None else "initial_capacity_factor"
            invalid(missing, getattr(self, missing), "leaves the schedule of the capacity open",
                    "give initial_capacity_factor and capacity_decay_steps, or neither")
        if self.initial_capacity_factor is not None and self.capacity_factor is None:
            invalid("capacity_factor", None, "is what initial_capacity_factor has to go to", "give both")
        return self

    def capacity_at(self, step: int) -> float | None:
        """The factor in optimizer step `step`, counted from 0."""
        if self.initial_capacity_factor is None or step >= self.capacity_decay_steps:
            return self.capacity_factor
        share = step / self.capacity_decay_steps
        return (1 - share) * self.initial_capacity_factor + share * self.capacity_factor

    @property
    def even(self) -> bool:
        return not self.limited

    @property
    def limited(self) -> bool:
        return self.capacity_factor is not None

    def unlimited(self) -> dict[str, Any]:
        return {"capacity_factor": None, "initial_capacity_factor": None, "capacity_decay_steps": 0}

    def quiet(self) -> dict[str, Any]:
        return {"warmup_steps": 0}


class OverflowSettings(LimitedSettings):
    """Those of them that may pass a token on."""

    overflow: Literal["drop", "next"] = Field(
        "drop", description="beyond the capacity: drop, or pass on to the next expert that has room"
    )


class MixtralSettings(OverflowSettings):
    """Softmax over the experts, the top k of it, renormalised (Jiang et al. 2024)."""

    type: Literal["mixtral"] = Field("mixtral", description="mixtral: softmax, top-k, renormalised")


class DenseSettings(RouterSettings):
    """Every expert, weighted by the softmax: the original mixture (Jacobs, Jordan, Nowlan and Hinton 1991)."""

    type: Literal["dense"] = "dense"

    def check(self, model: "ModelConfig") -> None:
        if model.num_experts_per_tok != model.num_local_experts:
            invalid("num_experts_per_tok", model.num_experts_per_tok,
                    "is not all experts, which model.router.type=dense gives to each token",
                    f"set it to num_local_experts={model.num_local_experts}")


class NoisyTopKSettings(OverflowSettings):
    """Learned noise, then the top k before the softmax, with importance and load losses (Shazeer et al. 2017)."""

    type: Literal["noisy_top_k"] = "noisy_top_k"
    importance_coef: float = Field(0.1, ge=0, description="weight of CV^2 of the gates' sums over tokens (equation 7)")
    load_coef: float = Field(0.1, ge=0, description="weight of CV^2 of the expected numbers of tokens (equation 11)")
    noise: bool = Field(True, description="false: nothing is drawn while training, as in evaluation")

    def parameter_shapes(self, model: "ModelConfig") -> Shapes:
        shape = (model.num_local_experts, model.hidden_size)
        return {"weight": shape, "noise_weight": shape}

    def quiet(self) -> dict[str, Any]:
        return {**super().quiet(), "noise": False}


class GShardSettings(LimitedSettings):
    """Top 2 with limited room; the second expert at random, in proportion to its weight (Lepikhin et al. 2020)."""

    type: Literal["gshard"] = "gshard"
    capacity_factor: float | None = Field(
        1.25, gt=0, description="an expert takes at most this many times its even share of each sequence, while "
        "training; null: no limit",
    )
    second_expert: Literal["random", "always"] = Field(
        "random", description="random: while training, with probability min(1, 2 * its weight)"
    )

    @property
    def even(self) -> bool:
        return super().even and self.second_expert == "always"

    def check(self, model: "ModelConfig") -> None:
        _exactly(model, 2, self.type)

    def quiet(self) -> dict[str, Any]:
        return {**super().quiet(), "second_expert": "always"}


class SwitchSettings(OverflowSettings):
    """The one likeliest expert with limited room, its probability as weight (Fedus et al. 2021)."""

    type: Literal["switch"] = "switch"
    capacity_factor: float | None = Field(
        1.25, gt=0, description="an expert takes at most this many times its even share of each sequence, while "
        "training; null: no limit",
    )

    def check(self, model: "ModelConfig") -> None:
        _exactly(model, 1, self.type)


class BatchPrioritisedSettings(OverflowSettings):
    """Top k with their probabilities as weights; where room is short, tokens of high score come first (Riquelme et al.
    2021)."""

    type: Literal["batch_prioritised"] = "batch_prioritised"
    capacity_factor: float | None = Field(
        1.05, gt=0, description="an expert takes at most this many times its even share of each sequence, while "
        "training; null: no limit",
    )
    score: Literal["max", "sum"] = Field("max", description="of a token: its largest weight, or the sum of its top k")
    noise: bool = Field(True, description="while training, logits get normal noise of deviation 1 / experts")
    causal: ClassVar[bool] = False

    def quiet(self) -> dict[str, Any]:
        return {**super().quiet(), "noise": False}


class TopPSettings(RouterSettings):
    """As many experts as it takes for their probabilities to reach p (Huang et al. 2024)."""

    type: Literal["top_p"] = "top_p"
    p: float = Field(
        0.4, gt=0, le=1, description="sum of probabilities that a token's experts reach; no token has more than "
        "model.num_experts_per_tok",
    )
    local_entropy_coef: float = Field(
        1e-4, ge=0, description="weight of the mean entropy of a token's distribution, which keeps the number of "
        "experts small",
    )

    @property
    def even(self) -> bool:
        return False


class HierarchicalSettings(RouterSettings):
    """Groups of experts first, then experts within the chosen groups (Jordan and Jacobs 1994; Shazeer et al. 2017,
    appendix B)."""

    type: Literal["hierarchical"] = "hierarchical"
    groups: int = Field(ge=2, description="groups of neighbouring experts, of equal size")
    groups_per_token: int = Field(1, ge=1, description="groups that a token passes through; each gives "
                                  "model.num_experts_per_tok / groups_per_token experts")

    def check(self, model: "ModelConfig") -> None:
        experts, chosen = model.num_local_experts, model.num_experts_per_tok
        if experts % self.groups:
            invalid("router.groups", self.groups, f"does not divide num_local_experts={experts}", "use a divisor")
        if self.groups_per_token > self.groups:
            invalid("router.groups_per_token", self.groups_per_token, f"is above groups={self.groups}", "lower it")
        if chosen % self.groups_per_token:
            invalid("router.groups_per_token", self.groups_per_token, f"does not divide num_experts_per_tok={chosen}",
                    "use a divisor")
        if chosen // self.groups_per_token > experts // self.groups:
            invalid("num_experts_per_tok", chosen,
                    f"asks {chosen // self.groups_per_token} experts of each group of {experts // self.groups}",
                    "lower it, or raise router.groups_per_token")

    def parameter_shapes(self, model: "ModelConfig") -> Shapes:
        return {"weight": (model.num_local_experts, model.hidden_size),
                "group_weight": (self.groups, model.hidden_size)}


class BalancedSettings(RouterSettings):
    """Experts by position, round and round, with the router's weights: for benchmarks, where every expert shall have
    the same work."""

    type: Literal["balanced"] = "balanced"


def _exactly(model: "ModelConfig", experts: int, kind: str) -> None:
    if model.num_experts_per_tok != experts:
        invalid("num_experts_per_tok", model.num_experts_per_tok, f"does not fit model.router.type={kind}",
                f"set it to {experts}")


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
}


def _settings(value: Any) -> Any:
    """The settings that a mapping describes, by its `type`; keys of other types are refused by name."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type", DEFAULT_TYPE)
    if not isinstance(kind, str) or kind not in ROUTER_SETTINGS:
        invalid("type", kind, "is no router", f"use one of {', '.join(ROUTER_SETTINGS)}")
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

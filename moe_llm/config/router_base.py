"""Settings that routers have in common: what the classes in `moe_llm.config.routers` are built on."""

from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid

DEFAULT_TYPE = "mixtral"
Shapes = dict[str, tuple[int, ...]]
CAPACITY = (
    "an expert takes at most this many times its even share of the real tokens of each document (of each block, where "
    "documents are not isolated), while training; null: no limit"
)
ENTROPY_COEFFICIENTS = ("entropy_bonus_coef", "local_entropy_coef", "global_entropy_coef")


class ModelSizes(Protocol):
    """The sizes of a model that router settings read: `ModelConfig` has them, which itself is made of such settings."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_local_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def expert_hidden_size(self) -> int: ...
    @property
    def expert_parameters(self) -> int: ...
    @property
    def expert_sizes(self) -> tuple[int, ...] | None: ...


class RouterSettings(Section):
    """How tokens choose experts. Each type has settings of its own besides these.

    parts_per_token: how many parts of a token are routed apart, each of an equal share of its width.
    """

    parts_per_token: ClassVar[int] = 1

    type: str = Field(DEFAULT_TYPE, description="which router; the types and their settings are below")
    entropy_bonus_coef: float = Field(
        0.0,
        ge=0,
        description="weight of minus the mean entropy of a token's distribution over experts: keeps routers "
        "from deciding too early",
    )
    local_entropy_coef: float = Field(
        0.0,
        ge=0,
        description="weight of that mean entropy: makes routers decide (LIMoE's local loss, Mustafa et al. "
        "2022, section 2.2)",
    )
    global_entropy_coef: float = Field(
        0.0,
        ge=0,
        description="weight of minus the entropy of the mean distribution: keeps all experts in use "
        "(LIMoE's global loss)",
    )
    global_entropy_threshold: float | None = Field(
        None,
        gt=0,
        description="nats up to which the global loss raises that entropy, max(0, this - entropy); null: without end",
    )

    causal: ClassVar[bool] = True  # whether, in training too, a token's experts depend on no later token
    needs_past: ClassVar[bool] = False  # whether experts work on earlier tokens too, so that generation reads them anew
    # where they do: why, and what evaluation and generation do instead
    looks_ahead: ClassVar[str] = "where room is short, who gets it depends on later tokens"
    afterwards: ClassVar[str] = "turn no token away"

    evaluates_by_buffers: ClassVar[bool] = False  # whether evaluation has no use for buffers that no step has changed
    spreads: ClassVar[bool] = True  # whether a sequence may be spread over ranks (parallel.sequence_parallel_size)
    learns_from_loss: ClassVar[bool] = False  # whether the router is told the tokens' losses while training
    follows_targets: ClassVar[bool] = False  # whether its own losses make each target likelier, whatever the run's loss
    merges: ClassVar[bool] = False  # whether experts' weights are mixed, rather than their outputs
    aux_loss_coef: ClassVar[float] = 0.02  # model.router_aux_loss_coef where it is not set: by the router's own source

    @model_validator(mode="after")
    def _entropies_agree(self):
        if self.entropy_bonus_coef and self.local_entropy_coef:
            invalid(
                "entropy_bonus_coef",
                self.entropy_bonus_coef,
                f"pulls against local_entropy_coef={self.local_entropy_coef:g}",
                "set one of them to 0",
            )
        if self.global_entropy_threshold is not None and not self.global_entropy_coef:
            invalid(
                "global_entropy_threshold",
                self.global_entropy_threshold,
                "applies to nothing without global_entropy_coef",
                "set that, or remove it",
            )
        return self

    def check(self, model: ModelSizes) -> None:
        """Refuse, with `invalid`, a model that this router does not fit; fields are relative to `model`."""

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        """The parameters of one layer's router, by name."""
        return {"weight": (model.num_local_experts, model.hidden_size)}

    def buffer_shapes(self, model: ModelSizes) -> Shapes:
        """What of one layer's router is no parameter but belongs to the model: fp32, begins at zero, is changed by
        the router's `after_step` alone, and is in every checkpoint."""
        return {}

    def check_length(self, length: int) -> None:
        """Refuse, with `invalid`, blocks of so many tokens; fields are relative to the whole configuration."""

    def shrunk(self, model: ModelSizes, experts: int, length: int) -> dict[str, Any]:
        """Changes of the model's section, `router` among them, for a copy with so many experts and blocks of so many
        tokens."""
        return {}

    def active_experts(self, model: ModelSizes) -> int:
        """How many rows of experts a token costs, at most; where experts choose tokens, on average."""
        return model.num_experts_per_tok

    @property
    def normalized(self) -> bool:
        """Whether the weights of a token's experts sum to 1 whatever the logits are."""
        return False

    # why the language-model loss cannot move those of `unweighed`
    weighs: ClassVar[str] = "where a token takes one of several, it has the weight 1 whatever its logit"

    def unweighed(self, model: ModelSizes) -> list[str]:
        """The router's parameters that the language-model loss cannot move: of a single expert the weight is 1."""
        return ["weight"] if self.normalized and model.num_experts_per_tok == 1 else []

    def mixed_per_token(self, model: ModelSizes) -> float:
        """How many multiplications a token costs beside those by parameters."""
        return 0

    def entered_per_token(self, model: ModelSizes) -> float:
        """How many values a token keeps for the backward pass, beside logits and experts, of what is put in its place
        and taken back."""
        return 0

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
        None,
        gt=0,
        description=CAPACITY,
    )
    capacity_order: str = Field(
        "position",
        pattern="^(position|choice)$",
        description="who gets the room. position: tokens in their order, each with all of its choices, which is causal; "
        "choice: all first choices before all second ones, as in the papers, so that later tokens decide too",
    )
    initial_capacity_factor: float | None = Field(
        None,
        gt=0,
        description="the factor at the first step, from which it goes to `capacity_factor` linearly; null: "
        "that from the start",
    )
    capacity_decay_steps: int = Field(0, ge=0, description="optimizer steps that this takes")
    warmup_steps: int = Field(
        0,
        ge=0,
        description="steps in which a token's experts are drawn at random with a probability that falls from "
        "1 to 0; their weights are the router's",
    )

    @model_validator(mode="after")
    def _schedule_is_whole(self):
        if (self.initial_capacity_factor is None) != (self.capacity_decay_steps == 0):
            missing = "capacity_decay_steps" if self.initial_capacity_factor is not None else "initial_capacity_factor"
            invalid(
                missing,
                getattr(self, missing),
                "leaves the schedule of the capacity open",
                "give initial_capacity_factor and capacity_decay_steps, or neither",
            )
        if self.initial_capacity_factor is not None and self.capacity_factor is None:
            invalid("capacity_factor", None, "is what initial_capacity_factor has to go to", "give both")
        if self.capacity_order == "choice" and self.capacity_factor is None:
            invalid(
                "capacity_order", "choice", "shares out no room without a limit", "set capacity_factor, or remove it"
            )
        return self

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.capacity_factor is None or self.capacity_order == "position"

    def capacity_at(self, step: int) -> float | None:
        """The factor in optimizer step `step`, counted from 0."""
        if self.initial_capacity_factor is None or step >= self.capacity_decay_steps:
            return self.capacity_factor
        assert self.capacity_factor is not None, "what initial_capacity_factor has to go to"
        share = step / self.capacity_decay_steps
        return (1 - share) * self.initial_capacity_factor + share * self.capacity_factor

    @property
    def even(self) -> bool:
        return not self.limited

    @property
    def limited(self) -> bool:
        return self.capacity_factor is not None

    def unlimited(self) -> dict[str, Any]:
        order = {"capacity_order": "position"} if self.capacity_order == "choice" else {}
        return {"capacity_factor": None, "initial_capacity_factor": None, "capacity_decay_steps": 0, **order}

    def quiet(self) -> dict[str, Any]:
        return {"warmup_steps": 0}


class OverflowSettings(LimitedSettings):
    """Those of them that may pass a token on, or hold what it is denied."""

    overflow: Literal["drop", "next", "residual", "queue"] = Field(
        "drop",
        description="beyond the capacity: drop; next: pass on to the next expert that has room; residual: the "
        "token itself takes the place of the expert's output, times the weight that this would have had; queue: the same "
        "expert takes it in a second round of the layer, as far as queue_depth goes",
    )
    queue_depth: float | None = Field(
        None,
        gt=0,
        description="with overflow: queue, what the second round takes at most, times the even share, as capacity_factor "
        "is for the first",
    )

    @model_validator(mode="after")
    def _there_is_overflow(self):
        if self.overflow != "drop" and self.capacity_factor is None:
            invalid("overflow", self.overflow, "never comes about without a limit", "set capacity_factor, or remove it")
        if (self.overflow == "queue") != (self.queue_depth is not None):
            missing = "is missing for overflow=queue" if self.queue_depth is None else "needs overflow=queue"
            invalid("queue_depth", self.queue_depth, missing, "set both, or neither")
        return self

    def unlimited(self) -> dict[str, Any]:
        return {**super().unlimited(), "overflow": "drop", "queue_depth": None}


def check_sizes(key: str, value: float, model: ModelSizes) -> None:
    """Refuse, with `invalid`, what only acts where experts differ in width."""
    if value and model.expert_sizes is None:
        invalid(key, value, "tells experts by their width, and all have one", "set model.expert_sizes, or remove it")

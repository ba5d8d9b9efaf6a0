"""Settings of routers whose gate is more than a linear map, or learns from the token's loss, by `model.router.type`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from moe_llm.config.base import invalid
from moe_llm.config.router_base import ModelSizes, OverflowSettings, RouterSettings, Shapes, check_sizes


class AttentionSettings(OverflowSettings):
    """The token's query attends to learned keys of the experts, with several heads; the top k of the heads' mean."""

    type: Literal["attention"] = "attention"
    heads: int = Field(4, ge=1, description="heads of the gate, each with a softmax over the experts of its own")
    key_size: int = Field(32, ge=1, description="width of a head's query and of each expert's key")
    temperature: float = Field(1.0, gt=0, description="what a head's scores are divided by, beside sqrt(key_size)")

    @property
    def normalized(self) -> bool:
        return True

    def unweighed(self, model: ModelSizes) -> list[str]:
        return ["weight", "query_weight"] if model.num_experts_per_tok == 1 else []

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        width = self.heads * self.key_size
        return {"weight": (model.num_local_experts, width), "query_weight": (width, model.hidden_size)}

    def mixed_per_token(self, model: ModelSizes) -> float:
        return self.heads * model.num_local_experts  # the heads' mean

    def entered_per_token(self, model: ModelSizes) -> float:
        return self.heads * (self.key_size + 2 * model.num_local_experts)


class TransformerSettings(OverflowSettings):
    """A small causal transformer block over the sequence, and a linear map of what it gives; the top k, renormalised."""

    type: Literal["transformer"] = "transformer"
    width: int = Field(64, ge=1, description="width of the gate's block, into which hidden states are mapped")
    heads: int = Field(4, ge=1, description="heads of its attention")
    window: int | None = Field(
        None, ge=1, description="tokens of its document that a token's gate sees, itself included; null: all before it"
    )
    needs_past: ClassVar[bool] = True
    spreads: ClassVar[bool] = False

    @property
    def normalized(self) -> bool:
        return True

    def check(self, model: ModelSizes) -> None:
        if self.width % self.heads:
            invalid("router.heads", self.heads, f"does not divide model.router.width={self.width}", "use a divisor")

    def unweighed(self, model: ModelSizes) -> list[str]:
        return list(self.parameter_shapes(model)) if model.num_experts_per_tok == 1 else []

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        wide = self.width
        return {
            "weight": (model.num_local_experts, wide),
            "input_weight": (wide, model.hidden_size),
            "qkv_weight": (3 * wide, wide),
            "output_weight": (wide, wide),
            "up_weight": (2 * wide, wide),
            "down_weight": (wide, 2 * wide),
            "attention_norm": (wide,),
            "mlp_norm": (wide,),
            "norm": (wide,),
        }

    def mixed_per_token(self, model: ModelSizes) -> float:
        seen = min(self.window or model.max_position_embeddings, model.max_position_embeddings)
        return seen * self.width  # scores and sums over half of the longest text

    def entered_per_token(self, model: ModelSizes) -> float:
        return 12 * self.width


class ReinforceSettings(RouterSettings):
    """Experts are sampled, and the gate learns by REINFORCE from the token's own loss (Bengio et al. 2013, 2015)."""

    type: Literal["reinforce"] = "reinforce"
    aux_loss_coef: ClassVar[float] = 0.0
    sample: bool = Field(True, description="false: the likeliest experts while training too, as in evaluation")
    baseline: Literal["learned", "leave_one_out"] = Field(
        "learned",
        description="what a token's loss is compared with. learned: a linear map of its hidden state, fitted to the loss; "
        "leave_one_out: the mean loss of the tokens before it in its document, which its choice does not change",
    )
    policy_coef: float = Field(
        1.0, gt=0, description="weight of the policy's loss; 1: the gradient of the expected loss"
    )
    baseline_coef: float = Field(0.5, gt=0, description="weight of the learned baseline's squared error")
    load_coef: float = Field(
        0.0,
        ge=0,
        description="added to a token's loss: this times the mean load of its experts over the even load, minus 1; loads "
        "are a running mean over steps",
    )
    cost_coef: float = Field(
        0.0,
        ge=0,
        description="with model.expert_sizes, added to a token's loss too: this times the mean width of its experts over the "
        "mean of all, minus 1, so that narrow experts are preferred where they do",
    )
    load_rate: float = Field(0.1, gt=0, le=1, description="share of the way that each step moves that running mean")
    entropy_bonus_coef: float = Field(
        0.01, ge=0, description="weight of minus the mean entropy of a token's distribution: keeps the policy exploring"
    )
    spreads: ClassVar[bool] = False
    learns_from_loss: ClassVar[bool] = True
    follows_targets: ClassVar[bool] = True
    weighs: ClassVar[str] = "all experts of a token weigh the same"

    @model_validator(mode="after")
    def _settings_act(self):
        for name, acts, needed in (
            ("baseline_coef", self.baseline == "learned", "baseline: learned"),
            ("load_rate", self.load_coef > 0, "load_coef"),
        ):
            value = getattr(self, name)
            if not acts and value != type(self).model_fields[name].default:
                invalid(name, value, f"does nothing without {needed}", f"set {needed}, or remove it")
        return self

    def check(self, model: ModelSizes) -> None:
        check_sizes("router.cost_coef", self.cost_coef, model)

    def unweighed(self, model: ModelSizes) -> list[str]:
        return list(self.parameter_shapes(model))

    def parameter_shapes(self, model: ModelSizes) -> Shapes:
        learned = {"baseline_weight": (1, model.hidden_size)} if self.baseline == "learned" else {}
        return {**super().parameter_shapes(model), **learned}

    def buffer_shapes(self, model: ModelSizes) -> Shapes:
        return {"load": (model.num_local_experts,)} if self.load_coef else {}

    def quiet(self) -> dict[str, Any]:
        return {**super().quiet(), "sample": False}


class EMSettings(RouterSettings):
    """Softmax, top k, renormalised; in the last layer the gate is fitted to the experts' posterior (Jacobs et al. 1991;
    Jordan and Jacobs 1994)."""

    type: Literal["em"] = "em"
    aux_loss_coef: ClassVar[float] = 0.0
    learns_from_loss: ClassVar[bool] = True
    follows_targets: ClassVar[bool] = True
    form: Literal["soft", "hard"] = Field(
        "soft",
        description="of the E-step. soft: experts are responsible as the posterior says; hard: the likeliest one alone",
    )
    gate_coef: float = Field(
        1.0, gt=0, description="weight of the M-step of the last layer's gate: cross-entropy to the posterior"
    )
    expert_coef: float = Field(
        1.0,
        ge=0,
        description="weight of the M-step of its experts: each one's own loss on a token, times its responsibility",
    )

    def check(self, model: ModelSizes) -> None:
        if model.num_hidden_layers - 1 not in model.moe_layers:
            invalid("router.type", self.type, "needs experts in the last block, which is dense", "give it experts")

    @property
    def normalized(self) -> bool:
        return True

    def entered_per_token(self, model: ModelSizes) -> float:
        return 3.0 * model.num_local_experts * model.hidden_size  # of the last layer: all experts of every token

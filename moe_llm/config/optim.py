"""The optimizer, the schedule of its learning rate, and the table of the optimizers that there are."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid


@dataclass(frozen=True)
class OptimizerEntry:
    """What the rest of the program has to know of an optimizer: to add one is to add an entry.

    factory: "module:class", a `torch.optim.Optimizer` that takes parameter groups and `lr`.
    takes: keys of `optim` that it is given as arguments. arguments: further ones, always the same.
    tensors: what it keeps for each parameter, by the names that they have in its state; checkpoints hold them.
    starts_as_weight: those of `tensors` that begin as a copy of the parameter; the others begin at zero.
    counters: numbers that it keeps in its parameter groups and that a resumed run needs.
    nbytes: of what it keeps for a parameter in fp32.
    zero_stages: in which it computes the same as in one process. elementwise: whether each element is updated by
        itself, so that slices of flattened parameters do.
    offload: whether its update may be computed in host memory.
    switches: whether it trains at other weights than those that are to be used; it then has `train()` and `eval()`.
    betas: used where `optim.betas` is not set. library: that is imported for it, and extra: of this package, that
        installs it.
    """

    factory: str
    takes: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    starts_as_weight: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    nbytes: float = 0.0
    zero_stages: tuple[int, ...] = (1, 2, 3)
    elementwise: bool = True
    offload: bool = True
    switches: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    library: str | None = None
    extra: str | None = None


# Muon's own tensor; what it leaves to AdamW has AdamW's
MUON_TENSORS = ("momentum_buffer",)
ADAMW_TENSORS = ("exp_avg", "exp_avg_sq")

OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry("torch.optim:AdamW", ("betas", "eps"), {"fused": True}, tensors=ADAMW_TENSORS, nbytes=8),
    "sgd": OptimizerEntry("torch.optim:SGD"),
    "muon": OptimizerEntry(
        "moe_llm.distributed.muon:Muon",
        ("betas", "eps", "muon"),
        tensors=MUON_TENSORS + ADAMW_TENSORS,
        nbytes=4,  # of a matrix; the planner adds what AdamW keeps of the rest
        zero_stages=(1, 2),
        elementwise=False,
        offload=False,
    ),
    "adamw_8bit": OptimizerEntry(
        "moe_llm.distributed.adamw_8bit:AdamW8bit",
        ("betas", "eps"),
        tensors=ADAMW_TENSORS,
        nbytes=2 + 8 / 256,
        library="bitsandbytes",
        extra="quantize",
    ),
    "lion": OptimizerEntry(
        "lion_pytorch:Lion",
        ("betas",),
        tensors=("exp_avg",),
        nbytes=4,
        betas=(0.9, 0.99),
        library="lion_pytorch",
        extra="lion",
    ),
    "schedule_free": OptimizerEntry(
        "schedulefree:AdamWScheduleFree",
        ("betas", "eps"),
        tensors=("z", "exp_avg_sq"),
        starts_as_weight=("z",),
        counters=("k", "weight_sum", "lr_max"),
        nbytes=8,
        zero_stages=(1, 2),
        switches=True,
        library="schedulefree",
        extra="schedule-free",
    ),
}

# `adamw` where `optim.master_weights` is not fp32
BF16_ADAMW = OptimizerEntry("moe_llm.train.bf16_adamw:BF16AdamW", ("betas", "eps"), tensors=ADAMW_TENSORS, nbytes=8)


class LrMultipliersConfig(Section):
    """Factors on `optim.lr` by part of the model."""

    router: float = Field(1.0, gt=0, description="factor on `optim.lr` for the routers")
    experts: float = Field(1.0, gt=0, description="factor on `optim.lr` for the experts")
    rest: float = Field(1.0, gt=0, description="factor on `optim.lr` for all else")


class MuonConfig(Section):
    """How Muon (Jordan et al. 2024) updates matrices; `optim.betas` and `optim.eps` are of AdamW, for all else."""

    momentum: float = Field(0.95, ge=0, lt=1, description="decay rate of the average of the gradients")
    nesterov: bool = Field(True, description="step from the average as it will be after this gradient")
    ns_steps: int = Field(5, ge=1, lt=100, description="steps of the Newton-Schulz iteration that orthogonalises")
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="match_rms_adamw: updates as large as AdamW's, so that optim.lr serves both (Liu et al. 2025); "
        "original: times sqrt(max(1, rows / columns))",
    )


class OptimConfig(Section):
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "adamw_8bit", "sgd", "muon", "lion", "schedule_free"] = Field(
        "adamw",
        description="adamw_8bit: adamw with moments of 8 bits, 2 bytes a parameter in place of 8 (extra quantize); "
        "sgd: plain, without momentum; muon: matrices between embedding and output layer by Muon, all else "
        "by AdamW; lion: signs of an average (extra lion); schedule_free: AdamW that needs no decay (extra "
        "schedule-free)",
    )
    lr: float = Field(3e-4, gt=0, description="the highest learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="decay rates of the two averages; of lion (0.9, 0.99) if not set"
    )
    eps: float = Field(1e-8, gt=0, description="adamw, adamw_8bit, muon, schedule_free: added to the denominator")
    muon: MuonConfig = Field(MuonConfig(), description="of name: muon")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; norms are never decayed")
    grad_clip: float = Field(1.0, ge=0, description="bound on the global gradient norm; 0: off")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="wsd: constant, then a decay at the end"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the rate rises from 0")
    decay_ratio: float = Field(
        0.2, gt=0, le=1, description="wsd: share of the steps, at the end, in which the rate falls"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final rate as a share of lr")
    lr_multipliers: LrMultipliersConfig = Field(LrMultipliersConfig(), description="rates by part of the model")
    master_weights: Literal["fp32", "stochastic_rounding", "kahan"] = Field(
        "fp32",
        description="what adamw updates with train.precision bf16: fp32: a copy of the weights, 4 bytes a parameter; "
        "stochastic_rounding: the bf16 weights themselves, rounded up or down by chance, without bias; kahan: these and "
        "in 2 bytes what rounding has left over",
    )

    @model_validator(mode="before")
    @classmethod
    def _betas_of_the_optimizer(cls, given: Any) -> Any:
        if isinstance(given, dict) and "betas" not in given and given.get("name") in list(OPTIMIZERS):
            return {**given, "betas": OPTIMIZERS[given["name"]].betas}
        return given

    @model_validator(mode="after")
    def _fits_the_optimizer(self) -> "OptimConfig":
        if not all(0 <= b < 1 for b in self.betas):
            invalid("betas", list(self.betas), "is out of range", "use two numbers in [0, 1)")
        if self.name != "muon" and self.muon != MuonConfig():
            invalid("muon", self.muon.model_dump(), f"is for name: muon, and that is {self.name}", "remove it")
        if OPTIMIZERS[self.name].switches and self.schedule != "constant":
            invalid(
                "schedule",
                self.schedule,
                f"lowers the rate, which {self.name} is made to do without",
                "set optim.schedule: constant (warmup_steps stay), or another optim.name",
            )
        return self


def check_optimizer(config: Any) -> None:
    """Refuse what the optimizer of a run cannot do together with the rest of its configuration."""
    name, entry = config.optim.name, OPTIMIZERS[config.optim.name]
    stage = config.parallel.zero_stage
    if stage not in entry.zero_stages:
        stages = " or ".join(map(str, entry.zero_stages))
        why = "needs whole matrices" if not entry.elementwise else "changes between two sets of weights"
        invalid("parallel.zero_stage", stage, f"cuts up the weights, and optim.name={name} {why}", f"use {stages}")
    if config.parallel.offload_optimizer != "none" and not entry.offload:
        invalid(
            "parallel.offload_optimizer",
            config.parallel.offload_optimizer,
            f"would multiply matrices of optim.name={name} in host memory",
            "use none, or optim.name=adamw",
        )
    if entry.switches and config.checkpoint.ema.decay is not None:
        invalid(
            "checkpoint.ema.decay",
            config.checkpoint.ema.decay,
            f"averages weights, and the weights of optim.name={name} are an average already",
            "remove one of the two",
        )
    if entry.switches and config.finetune.experts is not None and config.optim.weight_decay:
        invalid(
            "optim.weight_decay",
            config.optim.weight_decay,
            f"would not reach the average that optim.name={name} keeps of the weights of finetune.experts",
            "use 0, or optim.name=adamw",
        )
    if entry.switches and config.train.adversarial.router_every is not None:
        invalid(
            "train.adversarial.router_every",
            config.train.adversarial.router_every,
            f"trains parts in turns, and optim.name={name} averages over all steps",
            "use optim.name=adamw, or remove it",
        )

"""When a run says that its experts are in trouble."""

from pydantic import Field

from moe_llm.config.base import Section


class AlarmsConfig(Section):
    """Alarms in the log and on the console, each told once until what it tells of has passed."""

    window_steps: int | None = Field(
        100, ge=1, description="steps that an alarm looks back over, and has to have seen; null: no alarms"
    )
    dead_share: float = Field(
        0.05, ge=0, lt=1, description="an expert is dying below this share of an even share of the tokens; 0: off"
    )
    entropy_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="a router collapses below this share of ln(experts), its entropy when undecided; 0: off",
    )
    load_cv: float | None = Field(
        0.8, gt=0, description="loads drift apart above this variation, if it was half as large before; null: off"
    )
    gradient_ratio: float | None = Field(
        20.0,
        gt=1,
        description="an expert's gradient norm is an outlier above so many times its layer's median, in most records "
        "of the window; null: neither this nor the alarm of an expert without any gradient",
    )

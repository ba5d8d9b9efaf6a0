"""Meta-learning: the `train.meta` section."""

from typing import Any, Literal

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid


class MetaConfig(Section):
    """Weights that adapt fast: each of data.sources is a task, and each step adapts a copy of the weights to it first."""

    method: Literal["reptile", "fomaml", "maml"] | None = Field(
        None,
        description="what an optimizer step goes by. reptile: the way to the adapted weights (Nichol et al. 2018); fomaml: the "
        "gradient at the adapted weights; maml: the same brought back through the adaptation, by products with second "
        "derivatives (Finn et al. 2017); null: no meta-learning",
    )
    inner_steps: int = Field(5, ge=1, description="steps of plain gradient descent that adapt to a task")
    inner_lr: float = Field(0.01, gt=0, description="their rate")
    blocks: int = Field(4, ge=1, description="blocks of the task's source that each of them reads")

    @model_validator(mode="after")
    def _settings_apply(self):
        for name in ("inner_steps", "inner_lr", "blocks"):
            value = getattr(self, name)
            if self.method is None and value != type(self).model_fields[name].default:
                invalid(name, value, "applies to nothing without a method", "set method, or remove it")
        return self


def check_meta(config: Any) -> None:
    """Refuse what steps of meta-learning cannot be made of.

    Args:
        config: the whole `Config`, whose module imports this one.
    """
    method = config.train.meta.method
    if method is None:
        return
    data, parallel, train = config.data, config.parallel, config.train
    for is_so, what, remedy in (
        (len(data.sources) < 2, "needs a task in each of several data.sources, and there is one", "name more"),
        (any(s.streaming for s in data.sources), "reads tasks from any place, and a source streams", "use files"),
        (data.has_preference, "adapts to text, and sources hold preferences", "use content text or chat"),
        (parallel.expert_parallel_size > 1, "adapts on each rank by itself, and experts are spread", "set it to 1"),
        (parallel.zero_stage == 3, "adapts whole weights, and ZeRO-3 cuts them up", "use zero_stage 1 or 2"),
        (parallel.sequence_parallel_size > 1, "adapts on each rank by itself, and sequences are shared", "set it to 1"),
        (parallel.offload_optimizer != "none", "moves weights on the device alone", "set offload_optimizer: none"),
        (config.model.balance_over == "step", "has no counts of a step beforehand", "remove model.balance_over"),
        (bool(config.distill.teachers), "has no place for teachers", "remove distill"),
        (train.adversarial.epsilon is not None, "has no place for perturbations", "remove train.adversarial"),
        (config.finetune.router_guard.action == "regularise", "has no place for a guard's loss", "use another action"),
        (config.finetune.expert_sources is not None, "has a task for each source already", "remove expert_sources"),
    ):
        if is_so:
            invalid("train.meta.method", method, what, remedy)

"""How ranks share the work: the `parallel` section."""

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from moe_llm.config.base import HomePath, Section, invalid


class ParallelConfig(Section):
    """How ranks share the work."""

    expert_parallel_size: int = Field(1, ge=1, description="ranks that share one set of experts")
    sequence_parallel_size: int = Field(
        1,
        ge=1,
        description="neighbouring ranks that share each sequence, for long ones: all but attention works on a part of the "
        "positions, attention on a part of the heads (Ulysses, Jacobs et al. 2023)",
    )
    all_to_all_chunks: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="parts in which rows travel to their experts and back, so that the next part travels while "
        "one is computed; auto: 2 on CUDA, 1 on a CPU",
    )
    exchange: Literal["auto", "torch", "deep_ep"] = Field(
        "auto",
        description="what carries rows to their experts: torch's all-to-all, or the package deep_ep (a token travels once to "
        "each rank) on CUDA in bf16, for routers that give every token as many experts; auto: deep_ep where it is installed",
    )
    placement: Literal["static", "dynamic"] = Field(
        "static",
        description="which rank has which experts. static: neighbours stay together; dynamic: every "
        "placement_every_steps steps experts exchange ranks, with their optimizer tensors, so that the busiest rank has "
        "fewer rows; results and checkpoints are the same",
    )
    placement_every_steps: int = Field(100, ge=1, description="steps between such exchanges")
    zero_stage: Literal[1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage (0 clips wrongly under expert parallelism)"
    )
    engine: Literal["auto", "deepspeed"] = Field(
        "auto", description="auto: DeepSpeed with more than one rank; deepspeed: with one rank too"
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="cpu: the optimizer's fp32 masters and moments stay in host memory and are updated there "
        "(ZeRO-Offload, Ren et al. 2021); nvme: in files of `nvme_path`, mapped into host memory, which then holds gradients "
        "and as much of the rest as fits; both engage DeepSpeed with one rank too",
    )
    nvme_path: HomePath | None = Field(
        None,
        min_length=1,
        description="a directory on a fast disk of each machine, for offload_optimizer nvme: 12 bytes per trained parameter "
        "with AdamW, in files without names that end with the run",
    )
    overlap_comm: Literal["auto"] | bool = Field(
        "auto", description="reduce gradients while the backward pass goes on; auto: on CUDA with ZeRO-2 and 3"
    )
    reduce_bucket_size: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="gradients that are reduced together, elements; auto: 1/16 of the parameters that a rank holds, "
        "from 5 to 500 million",
    )
    communication_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of gradients while they are reduced over ranks; bf16 halves the traffic and rounds the sums",
    )

    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of gradients as they are summed over micro-batches, with train.precision bf16; bf16 holds 2 bytes a "
        "parameter in place of 4 and rounds the sums",
    )

    @model_validator(mode="after")
    def _nvme_has_a_path(self):
        if self.offload_optimizer == "nvme" and self.nvme_path is None:
            invalid("offload_optimizer", "nvme", "needs a directory for its files", "set parallel.nvme_path")
        if self.nvme_path is not None and self.offload_optimizer != "nvme":
            invalid("nvme_path", self.nvme_path, "holds nothing", "set offload_optimizer: nvme, or remove it")
        return self

    @model_validator(mode="after")
    def _placement_is_dynamic(self):
        if self.placement == "static" and self.placement_every_steps != 100:
            invalid("placement_every_steps", self.placement_every_steps, "moves nothing", "set placement: dynamic")
        return self

    @model_validator(mode="after")
    def _overlap_applies(self):
        if self.overlap_comm is True and self.zero_stage == 1:
            invalid("overlap_comm", True, "does not act in ZeRO-1, which reduces once a step", "use zero_stage 2 or 3")
        return self


def check_narrow_state(config: Any) -> None:
    """Refuse bf16 gradients and bf16 weights without fp32 masters where they cannot be had.

    Args:
        config: the whole `Config`, whose module imports this one.
    """
    gradients, weights = config.parallel.gradient_dtype, config.optim.master_weights
    if gradients != "fp32":
        for key, given, why, remedy in (
            ("train.precision", config.train.precision == "fp32" and "fp32", "has fp32 gradients", "bf16"),
            (
                "parallel.offload_optimizer",
                config.parallel.offload_optimizer != "none" and config.parallel.offload_optimizer,
                "sums fp32 gradients in host memory",
                "none",
            ),
        ):
            if given:
                invalid(
                    "parallel.gradient_dtype",
                    gradients,
                    f"does not go with {key}={given}, which {why}",
                    f"set {key}: {remedy}",
                )
    if weights == "fp32":
        return
    for key, given, why, remedy in (
        ("parallel.gradient_dtype", gradients == "fp32" and "fp32", "is wider than the weights", "bf16"),
        ("optim.name", config.optim.name != "adamw" and config.optim.name, "knows no bf16 weights", "adamw"),
        (
            "finetune.experts",
            config.finetune.experts,
            "decays rows of stacked weights by themselves, by less than bf16 can hold",
            "null",
        ),
    ):
        if given:
            invalid(
                "optim.master_weights", weights, f"does not go with {key}={given}, which {why}", f"set {key}: {remedy}"
            )


def check_sequence_parts(config: Any) -> None:
    """Refuse what cannot be spread over the ranks that share a sequence.

    Args:
        config: the whole `Config`, whose module imports this one.
    """
    size = config.parallel.sequence_parallel_size
    conflict = sequence_parts_conflict(config, size)
    if conflict is not None:
        invalid("parallel.sequence_parallel_size", size, *conflict)


def sequence_parts_conflict(config: Any, size: int) -> tuple[str, str] | None:
    """What keeps `size` ranks from sharing each sequence, and what to do about it; None if nothing does."""
    model = config.model
    if size == 1:
        return None
    heads, kv = model.num_attention_heads, model.kv_heads
    if config.data.sequence_length % size:
        return f"does not divide data.sequence_length={config.data.sequence_length}", "use a divisor"
    if heads % size or (kv % size and size % kv):
        return (
            f"does not spread {heads} query heads with {kv} key-value heads evenly: attention works on a part of the heads",
            f"use a divisor of {heads} that divides {kv}, or is a multiple of it",
        )
    for key, conflicts, why in (
        (
            "model.router.type",
            not model.router.spreads and model.router.type,
            "works on segments that would lie on several ranks",
        ),
        (
            "model.router_aux_loss_scope",
            model.router_aux_loss_scope == "transformers" and "transformers",
            "is a loss of each rank's own tokens",
        ),
        ("distill.teachers", [t.model_dump() for t in config.distill.teachers], "read whole sequences"),
        ("train.adversarial.epsilon", config.train.adversarial.epsilon, "is of whole sequences"),
        (
            "finetune.router_guard.action",
            config.finetune.router_guard.action not in ("off", "freeze") and config.finetune.router_guard.action,
            "compares whole sequences",
        ),
    ):
        if conflicts:
            return f"does not go with {key}={conflicts}, which {why}", "set it to 1"
    return None

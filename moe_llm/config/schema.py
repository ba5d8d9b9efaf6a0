"""What a run is: one pydantic model per section of the YAML file."""

import math
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from moe_llm.config.adversarial import AdversarialConfig
from moe_llm.config.base import HomePath, Section, invalid, size_in_bytes
from moe_llm.config.data import DataConfig
from moe_llm.config.distill import DistillConfig, with_teachers_tokenizer
from moe_llm.config.ema import EmaConfig
from moe_llm.config.evaluate import EvaluateConfig
from moe_llm.config.finetune import FinetuneConfig
from moe_llm.config.log import LoggingConfig
from moe_llm.config.meta import MetaConfig, check_meta
from moe_llm.config.model import ModelConfig
from moe_llm.config.optim import OptimConfig, check_optimizer
from moe_llm.config.parallel import ParallelConfig, check_narrow_state, check_sequence_parts
from moe_llm.config.preference import PreferenceConfig, check_preference
from moe_llm.errors import UserError


class RunConfig(Section):
    """Where a run lives, and its seed."""

    dir: HomePath = Field(
        "runs/default", min_length=1, description="run directory; running again resumes what is there"
    )
    seed: int = Field(0, ge=0, description="initialisation, data order, tokenizer sampling and router noise")


class TokenizerConfig(Section):
    """An existing tokenizer, or how to train one on `data.sources`."""

    path: str | None = Field(
        None, description="tokenizer directory, sentencepiece .model file or hub name; null: train one"
    )
    end_tokens: list[str] | None = Field(
        None,
        min_length=1,
        description="tokens at which the exported model stops (eos_token_id of generation_config.json); null: those of "
        "model.init_from or, without it, the end of text and the token that ends the assistant's turn",
    )
    train_bytes: int = Field(
        20_000_000, ge=1000, description="text sampled from the sources for training the tokenizer, bytes"
    )
    character_coverage: float = Field(
        0.9995, gt=0, le=1, description="share of characters with a token of their own; the rest are bytes"
    )


class EarlyStoppingConfig(Section):
    """When to end before the last step; each evaluation's weights are saved where they are the best so far."""

    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations in a row without a new best validation loss that end the run; the best checkpoint is "
        "kept, whatever `checkpoint.keep_last`, as checkpoints/best; null: off",
    )
    min_delta: float = Field(0.0, ge=0, description="nats per token by which a new best has to be below the last one")

    @model_validator(mode="after")
    def _applies(self):
        if self.patience is None and self.min_delta:
            invalid("min_delta", self.min_delta, "applies to nothing without patience", "set patience, or remove it")
        return self


class CallbackConfig(Section):
    """One of the user's own callbacks."""

    name: str | None = Field(
        None, min_length=1, description="as an installed package registers it, under the entry points moe_llm.callbacks"
    )
    path: str | None = Field(None, min_length=1, description="or as package.module.Class")
    args: dict[str, Any] = Field({}, description="arguments of the class, by name")

    @model_validator(mode="after")
    def _one_of_both(self):
        if (self.name is None) == (self.path is None):
            problem = "is given together with path" if self.name else "and path are both missing"
            invalid("name", self.name, problem, "give one of the two")
        return self


class TrainConfig(Section):
    """How long and in what portions to train."""

    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or give max_tokens")
    max_tokens: int | None = Field(None, ge=1, description="training tokens without padding, rounded up to whole steps")
    micro_batch_size: int = Field(1, ge=1, description="blocks a rank takes through the model at once")
    global_batch_size: int = Field(1, ge=1, description="blocks an optimizer step, over all ranks")
    held_micro_batches: int = Field(
        1,
        ge=1,
        description="with model.balance_over: step, micro-batches of a step whose activations are held at the same time; "
        "the others pass through the model once more",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="bf16 keeps fp32 master weights; unset: bf16, or fp32 on a CPU that emulates bf16"
    )
    activation_checkpointing: Literal["off", "full", "selective"] = Field(
        "off",
        description="recompute each layer in the backward pass, with the same routing: full: all of it; selective: all but "
        "attention and what the experts' exchanges brought, which are kept; true and false are full and off",
    )
    activation_offload: bool = Field(
        False,
        description="what layers keep for their backward pass waits in host memory, so that a GPU holds about two layers' "
        "activations; with selective recomputation also what that keeps. On a CPU it only costs copies",
    )
    tiled_mlp: int = Field(
        1,
        ge=1,
        description="for long sequences: parts of the rows of a feed-forward layer (experts, shared experts, dense layers) "
        "that are computed one after the other, and again in the backward pass, so that the projections of one part alone "
        "are held; 1: all at once",
    )
    kernels: Literal["auto", "torch", "liger"] = Field(
        "auto",
        description="norms, rotary embeddings, shared experts' activations and the loss on a GPU: torch's operations, or the "
        "package liger-kernel's (extra `liger`); auto: liger-kernel's where it is installed",
    )
    compile: bool = Field(
        False,
        description="torch.compile of what lies between products: routers' statistics, rotary embeddings, the loss, experts' "
        "activations; a minute at the start, fewer and larger kernels on a GPU",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, bit-reproducible sums in place of faster ones (torch.use_deterministic_algorithms), on a CPU the same "
        "number of threads whatever else runs there; see "
        "docs/guides/gpu.md for the routers that need it",
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: a GPU where there is one")
    on_nan: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="a loss or gradient that is not finite, found before the step: stop: save what was before it and "
        "end; skip: leave its batch out; rollback: also go back to the newest checkpoint's weights",
    )
    max_bad_steps: int = Field(
        3, ge=1, description="skip: such steps in a row, rollback: without a new checkpoint between, that end the run"
    )
    spike_threshold: float | None = Field(
        8.0, gt=0, description="deviations above the running median at which a loss is told as a spike; null: off"
    )
    hang_timeout_seconds: float | None = Field(
        1800.0, gt=0, description="a rank that shows no progress for so long ends the run; null: never"
    )

    callbacks: list[CallbackConfig] = Field(
        [], description="the user's own callbacks, called in this order: docs/guides/custom-callback.md"
    )
    early_stopping: EarlyStoppingConfig = Field(EarlyStoppingConfig(), description="an end before the last step")
    meta: MetaConfig = Field(MetaConfig(), description="weights that adapt fast to each of data.sources")
    adversarial: AdversarialConfig = Field(AdversarialConfig(), description="perturbed embeddings; routers in turns")

    @field_validator(
        "activation_checkpointing", mode="before", json_schema_input_type=bool | Literal["off", "full", "selective"]
    )
    @classmethod
    def _switch_is_a_choice(cls, value: object) -> object:
        return {True: "full", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _compiled_layers_run_whole(self):
        if self.compile and self.recomputes:
            invalid(
                "compile",
                True,
                "does not act with activation_checkpointing, whose passes torch.compile does not enter",
                "set one of them to false",
            )
        return self

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass, in full or in part."""
        return self.activation_checkpointing != "off"

    @model_validator(mode="after")
    def _one_length(self):
        remedy = "give exactly one of train.max_steps and train.max_tokens"
        if self.max_steps is None and self.max_tokens is None:
            invalid("max_steps", None, "leaves the length of the run open, as train.max_tokens does", remedy)
        if self.max_steps is not None and self.max_tokens is not None:
            invalid("max_steps", self.max_steps, f"stands beside train.max_tokens={self.max_tokens}", remedy)
        return self


class CheckpointConfig(Section):
    """When and how the run is saved."""

    every_steps: int | None = Field(None, ge=1, description="null: at the end only")
    async_: bool = Field(
        False,
        alias="async",
        description="write in the background: a step waits for a copy in host memory of what its rank writes, "
        "not for the disk",
    )
    keep_last: int | None = Field(None, ge=1, description="older ones are deleted; null: keep all")
    resume: HomePath = Field(
        "auto", min_length=1, description="auto: newest complete checkpoint of the run; never; or a path"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the exported weights; fp32 masters are kept in trainer/ if it is bf16"
    )
    max_shard_size: str = Field(
        "5GB", description="size above which the weights are split over files: a number and KB, MB or GB"
    )
    ema: EmaConfig = Field(EmaConfig(), description="an average of the weights, kept while they are trained")
    license: str | None = Field(
        None, min_length=1, description="the model card's licence, as hubs name it (apache-2.0); null: unknown"
    )
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="OWNER/NAME of a repository on the Hugging Face hub to which the last checkpoint of a complete run goes, "
        "without trainer state; a new one is private",
    )

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _number_is_no_size(cls, value: object) -> object:
        return str(value) if isinstance(value, int | float) else value  # what it lacks is a unit, not quotes

    @model_validator(mode="after")
    def _size_is_readable(self):
        if size_in_bytes(self.max_shard_size) is None:
            invalid("max_shard_size", self.max_shard_size, "is not a size", "write it like 5GB or 500MB")
        return self


class Config(Section):
    """A run. Read it with `load_config`; `moe-llm config schema` prints its JSON schema."""

    _fill: float = PrivateAttr(1.0)

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    preference: PreferenceConfig = PreferenceConfig()
    distill: DistillConfig = DistillConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_is_the_teachers(cls, given: Any) -> Any:
        return with_teachers_tokenizer(given)

    @model_validator(mode="after")
    def _sections_fit(self):
        model, data, train, ep = self.model, self.data, self.train, self.parallel.expert_parallel_size
        if train.held_micro_batches > 1 and model.balance_over != "step":
            invalid(
                "train.held_micro_batches",
                train.held_micro_batches,
                f"is for model.balance_over=step, and that is {model.balance_over}",
                "remove it, or set model.balance_over: step",
            )
        if train.held_micro_batches > 1 and self.parallel.zero_stage == 3:
            invalid(
                "train.held_micro_batches",
                train.held_micro_batches,
                "needs ZeRO stage 2 or below: with 3, a backward pass has to follow its own forward pass",
                "remove it, or set parallel.zero_stage to 1 or 2",
            )
        if model.num_local_experts % ep:
            invalid(
                "parallel.expert_parallel_size",
                ep,
                f"does not divide model.num_local_experts={model.num_local_experts}",
                f"use a divisor of {model.num_local_experts}",
            )
        if data.sequence_length > model.longest_text:
            scaled = "" if model.rope_parameters.factor is None else " as model.rope_parameters scales it"
            invalid(
                "data.sequence_length",
                data.sequence_length,
                f"is above model.max_position_embeddings={model.max_position_embeddings}{scaled}",
                "lower the one or raise the other",
            )
        model.router.check_length(data.sequence_length)
        check_sequence_parts(self)
        check_narrow_state(self)
        if train.global_batch_size % train.micro_batch_size:
            invalid(
                "train.global_batch_size",
                train.global_batch_size,
                f"is not a multiple of train.micro_batch_size={train.micro_batch_size}",
                "change one of them",
            )
        check_preference(self)
        check_optimizer(self)
        check_meta(self)
        if train.on_nan == "rollback" and self.checkpoint.every_steps is None:
            invalid(
                "train.on_nan",
                train.on_nan,
                "has no checkpoint to go back to",
                "set checkpoint.every_steps, or use skip or stop",
            )
        if train.early_stopping.patience is not None and self.evaluate.every_steps is None:
            invalid(
                "train.early_stopping.patience",
                train.early_stopping.patience,
                "has no evaluations to count before the end",
                "set evaluate.every_steps",
            )
        if self.evaluate.ema and self.checkpoint.ema.decay is None:
            invalid("evaluate.ema", True, "has no average to measure", "set checkpoint.ema.decay")
        if self.tokenizer.path is None and model.vocab_size is None:
            invalid(
                "model.vocab_size",
                None,
                "is missing while the tokenizer is to be trained",
                "set model.vocab_size, or tokenizer.path to an existing tokenizer",
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Places for tokens, padding among them."""
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        assert self.train.max_tokens is not None, "one of the two is given"
        return math.ceil(round(self.train.max_tokens / (self.tokens_per_step * self._fill), 6))

    @property
    def fill(self) -> float:
        """Share of a step's places that hold a token, as far as it is known; 1 before data are read."""
        return self._fill

    def with_fill(self, fill: float) -> "Config":
        """The same for data whose blocks are filled with tokens, not padding, to this share: `train.max_tokens` counts
        tokens, so that a run on half empty blocks has twice the steps."""
        copy = self.model_copy()
        copy._fill = fill
        return copy

    @property
    def reduce_bucket_size(self) -> int:
        """Elements that DeepSpeed reduces or gathers at once.

        A bucket is a buffer of that size on every rank (two with overlap), so it follows the size of what a rank
        holds: DeepSpeed's fixed 500 million are 2 GB in fp32 however small the model is.
        """
        if self.parallel.reduce_bucket_size != "auto":
            return self.parallel.reduce_bucket_size
        # before the tokenizer is read its number of tokens may be unknown: Mixtral's serves, for it matters little
        known = self.model if self.model.vocab_size else self.model.model_copy(update={"vocab_size": 32_000})
        counts = known.parameter_counts()
        held = sum(counts.values()) - counts["experts"] + counts["experts"] // self.parallel.expert_parallel_size
        return min(500_000_000, max(5_000_000, held // 16))

    def expert_range(self, rank: int) -> range:
        """The experts of each layer that a rank holds: `expert_parallel_size` neighbours share one set."""
        size = self.parallel.expert_parallel_size
        held = self.model.num_local_experts // size
        return range(rank % size * held, (rank % size + 1) * held)

    def check_layout(self, world_size: int) -> None:
        """Refuse a number of ranks that the expert-parallel size or the batch sizes do not fit."""
        size, sequence = self.parallel.expert_parallel_size, self.parallel.sequence_parallel_size
        if world_size % sequence:
            raise UserError(
                f"parallel.sequence_parallel_size={sequence} does not divide the number of launched ranks, {world_size}: "
                "launch a multiple of it (accelerate launch --num_processes), or lower it"
            )
        if world_size % size:
            raise UserError(
                f"parallel.expert_parallel_size={size} does not divide the number of launched ranks, {world_size}: "
                "launch a multiple of it (accelerate launch --num_processes), or lower it"
            )
        self.accumulation_steps(world_size)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches each rank takes an optimizer step; a `UserError` names what does not divide."""
        train = self.train
        sequence = self.parallel.sequence_parallel_size
        per_round = train.micro_batch_size * (world_size // sequence)
        if train.global_batch_size % per_round:
            shared = f" / parallel.sequence_parallel_size={sequence}" if sequence > 1 else ""
            raise UserError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={train.micro_batch_size} x {world_size} ranks{shared} = {per_round}: "
                "change one of them"
            )
        return train.global_batch_size // per_round

"""What a run reads: sources, their shares, and how their documents become blocks."""

from typing import Literal

from pydantic import Field, model_validator

from moe_llm.config.augment import AugmentConfig
from moe_llm.config.base import Section, invalid

ChatColumn = Literal[
    "messages", "conversations", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output",
    "system", "history", "tools", "weight", "train", "label", "role", "content",
]  # fmt: skip


class SourceConfig(Section):
    """One source of text."""

    type: Literal["files", "hub", "python_stdlib"] = Field(
        description="python_stdlib: the source text of the running Python's standard library"
    )
    path: str | list[str] | None = Field(
        None, description="files: path, glob or list of them; hub: dataset name or local dataset directory"
    )
    format: Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "megatron", "datatrove"] = Field(
        "auto",
        description="files: auto goes by ending and content; json is an array of rows; gz, bz2, xz and zst are unpacked; "
        "megatron (.bin with .idx) and datatrove (.ds with .ds.index, as nanotron reads) hold tokens",
    )
    content: Literal["text", "chat", "preference"] = Field(
        "text",
        description="chat: rows with `messages`, or `prompt` and `completion`; the assistant's turns are learned; preference: "
        "rows with `chosen` and `rejected`, with or without `prompt`, as messages or text; see section preference",
    )
    name: str | None = Field(None, description="hub: configuration name")
    split: str = Field("train", description="hub: split")
    text_field: str = Field("text", description="jsonl, parquet and hub: the column that holds the text")
    columns: dict[ChatColumn, str] | None = Field(
        None,
        description="chat: names of the file's columns, such as {prompt: question, completion: answer}; role and content "
        "name the fields of a turn; null: as they are recognised (docs/guides/chat-data.md)",
    )
    document: Literal["file", "line"] = Field("file", description="text: what one document is")
    streaming: bool = Field(
        False,
        description="hub, or files at addresses such as s3://bucket/*.jsonl.zst: tokenised while they are trained on, with "
        "bounded disk and memory (docs/guides/prepare-data.md)",
    )
    weight: float | None = Field(
        None, gt=0, description="share of the training blocks (relative); null for all: by size"
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="text: changes of what is trained on")

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path or []

    @model_validator(mode="after")
    def _path_fits_type(self):
        if self.type != "python_stdlib" and not self.path:
            invalid("path", self.path, f"is missing for a source of type {self.type}", "name the data")
        if self.type == "python_stdlib" and self.path is not None:
            invalid("path", self.path, "does not apply to python_stdlib", "remove it or use type: files")
        if self.type == "hub" and isinstance(self.path, list):
            invalid("path", self.path, "names several datasets", "use one source for each")
        if self.content != "text" and self.type == "python_stdlib":
            invalid("content", self.content, "does not apply to python_stdlib", "use content: text, or name other data")
        if self.content != "text" and self.format in ("text", "megatron", "datatrove"):
            invalid("format", self.format, f"has no rows, and content is {self.content}", "use jsonl or parquet")
        if self.streaming and (self.type == "python_stdlib" or self.content != "text"):
            what = self.type if self.type == "python_stdlib" else f"content: {self.content}"
            invalid("streaming", True, f"does not apply to {what}", "set it to false")
        if self.streaming and self.format in ("megatron", "datatrove"):
            invalid(
                "streaming",
                True,
                f"does not apply to format {self.format}, whose files need their index",
                "set it to false",
            )
        if self.type == "files" and not self.streaming and any("://" in address for address in self.paths):
            invalid("path", self.path, "is an address, and files are read from this machine", "set streaming: true")
        if self.augment.kind is not None and self.content != "text":
            invalid("augment", self.augment.kind, f"does not apply to content: {self.content}", "remove it")
        if self.content != "chat" and self.columns is not None:
            invalid("columns", self.columns, "applies to content: chat", "use text_field for the column of text")
        for of_turns in (False, True):
            own = [column for name, column in (self.columns or {}).items() if (name in ("role", "content")) == of_turns]
            if len(set(own)) < len(own):
                invalid("columns", self.columns, "names a column for two things", "give each a column of its own")
        return self


class StageConfig(Section):
    """The shares of the sources from a step on."""

    from_step: int = Field(0, ge=0, description="the first step of the stage, counted in batches that are read")
    weights: list[float] = Field(
        min_length=1, description="share of the training blocks of each source, in their order (relative); 0: none"
    )


class DataConfig(Section):
    """What the model reads."""

    sources: list[SourceConfig] = Field(min_length=1, description="the texts to train on")
    stages: list[StageConfig] = Field(
        [],
        description="shares of the sources that change at given steps, in place of their `weight`, which holds before the "
        "first stage; each source goes on where it was",
    )
    validation_sources: list[SourceConfig] = Field(
        [], description="held-out text of its own; empty: a share of `sources` is held out"
    )
    validation_fraction: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="share of the documents held out, chosen by a hash of their text; where that chooses none, or too few (a "
        "few large documents), the end of the largest document is held out; unused with validation_sources",
    )
    sequence_length: int = Field(1024, ge=2, description="tokens a block")
    isolate_documents: bool = Field(
        True, description="tokens attend within their own document only; false: across a whole block"
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat",
        description="text into blocks: concat: one document behind the other, cut where a block ends; best_fit: whole "
        "documents where the least room remains, longer ones in pieces (Ding et al. 2024)",
    )
    order: Literal["source", "similar"] = Field(
        "source",
        description="in which training documents follow each other in blocks: as in their source, or each by "
        "the one most like it (Lory, Zhong et al. 2024, section 3); `run.seed` chooses the first",
    )
    chat_template: str = Field(
        "auto",
        min_length=1,
        description="for content chat: tokenizer: its own; mixtral: Mixtral-Instruct's; auto: its own where it has "
        "one, else Mixtral's; or a jinja file",
    )
    overlong: Literal["drop", "truncate"] = Field(
        "drop", description="chat examples longer than a block: left out, or their end is; counted at the start"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="chat: the assistant's turns that are learned: all, or the last of each example"
    )
    parse_special_tokens: bool = Field(
        False,
        description="content text: the text of a special token, such as <s> or [INST], becomes that token, for text that a "
        "chat template has rendered; false: it is learned as the text it is",
    )
    bootstrap_seed: int | None = Field(
        None,
        ge=0,
        description="training blocks are drawn with replacement, as many as there are, by this seed: members for bagging "
        "differ in it (Breiman 1996); held-out text is not resampled. null: every block once an epoch",
    )
    cache_dir: str = Field("~/.cache/moe_llm", description="tokenised data, keyed by its inputs; safe to delete")
    num_workers: int | None = Field(None, ge=1, description="tokenisation threads; null: all cores")
    allow_changed: bool = Field(
        False,
        description="a run may resume on other text or another mixture than it was started with; reported, and recorded "
        "in facts.json and the checkpoints",
    )

    @model_validator(mode="after")
    def _augmentation_fits(self):
        for index, source in enumerate(self.validation_sources):
            if source.augment.kind is not None:
                key = f"validation_sources.{index}.augment"
                invalid(key, source.augment.kind, "would change held-out text, which stays as it is", "remove it")
        for index, source in enumerate(self.sources):
            if source.augment.kind not in (None, "mask") and not self.isolate_documents:
                kind = source.augment.kind
                needs = "works on whole documents, and isolate_documents is false"
                invalid(f"sources.{index}.augment.kind", kind, needs, "set it to true, or use mask")
        return self

    @model_validator(mode="after")
    def _packing_fits(self):
        if self.packing == "best_fit" and not self.isolate_documents:
            invalid("packing", self.packing, "packs by length, and isolate_documents is false", "set it to true")
        if self.packing == "best_fit" and self.order == "similar":
            invalid("packing", self.packing, "packs by length, and order is similar", "use packing: concat")
        return self

    @model_validator(mode="after")
    def _weights_all_or_none(self):
        given = [s.weight is not None for s in self.sources]
        if any(given) and not all(given):
            invalid(
                f"sources.{given.index(False)}.weight",
                None,
                "is missing while other sources have one",
                "give every source a weight, or none",
            )
        return self

    @model_validator(mode="after")
    def _streams_can_be_mixed(self):
        streams = [f"sources.{i}" for i, source in enumerate(self.sources) if source.streaming]
        for number, source in enumerate(self.validation_sources):
            if source.streaming:
                key = f"validation_sources.{number}.streaming"
                invalid(key, True, "would measure other text each time", "name files that stay as they are")
        if streams and self.order != "source":
            invalid(
                "order", self.order, "needs all documents before the first, and a source streams", "leave it at source"
            )
        if streams and self.bootstrap_seed is not None:
            invalid(
                "bootstrap_seed",
                self.bootstrap_seed,
                "draws from blocks that are all there, and a source streams",
                "remove it, or prepare the source",
            )
        if streams and len(self.sources) > 1 and self.sources[0].weight is None and not self.stages:
            invalid(
                f"{streams[0]}.weight",
                None,
                "is missing, and the size of a stream is not known",
                "give every source one",
            )
        return self

    @model_validator(mode="after")
    def _stages_fit_sources(self):
        if not self.stages:
            return self
        if len(self.sources) == 1:
            invalid("stages", "[...]", "mixes several sources, and there is one", "remove it or add sources")
        for number, stage in enumerate(self.stages):
            if len(stage.weights) != len(self.sources):
                invalid(
                    f"stages.{number}.weights",
                    stage.weights,
                    f"are {len(stage.weights)} shares for {len(self.sources)} sources",
                    "give each source its share, 0 for none",
                )
            if any(weight < 0 for weight in stage.weights) or not any(stage.weights):
                invalid(
                    f"stages.{number}.weights", stage.weights, "are no shares", "give 0 or more, and one that is more"
                )
            if number and stage.from_step <= self.stages[number - 1].from_step:
                invalid(
                    f"stages.{number}.from_step",
                    stage.from_step,
                    "is not behind the stage before it",
                    "list the stages in the order of their steps",
                )
        weighed = self.sources[0].weight is not None
        if self.stages[0].from_step and not weighed:
            invalid(
                "stages.0.from_step",
                self.stages[0].from_step,
                "leaves the steps before it without shares",
                "begin at step 0, or give every source a weight",
            )
        if not self.stages[0].from_step and weighed:
            invalid("sources.0.weight", self.sources[0].weight, "has no effect, stages begin at step 0", "remove it")
        for number in range(len(self.sources)):
            if not weighed and not any(stage.weights[number] for stage in self.stages):
                invalid(f"sources.{number}", "{...}", "has the share 0 in every stage", "remove it, or give it a share")
        return self

    @property
    def has_chat(self) -> bool:
        """Whether any source has conversations, or preferences, which may be between conversations."""
        return any(source.content != "text" for source in [*self.sources, *self.validation_sources])

    @property
    def has_preference(self) -> bool:
        return any(source.content == "preference" for source in self.sources)

    @model_validator(mode="after")
    def _preferences_stand_alone(self):
        for name in ("sources", "validation_sources"):
            for index, source in enumerate(getattr(self, name)):
                if (source.content == "preference") != self.has_preference:
                    invalid(
                        f"{name}.{index}.content",
                        source.content,
                        "stands beside preferences, which have a loss of their own",
                        "give every source content: preference, or none",
                    )
        return self

    @model_validator(mode="after")
    def _chat_settings_apply(self):
        if self.has_chat and not self.isolate_documents:
            invalid("isolate_documents", False, "would let chat examples attend to each other", "leave it true")
        if self.order != "source" and any(source.content != "text" for source in self.sources):
            invalid(
                "order",
                self.order,
                "is for documents that follow each other, and chat examples are packed by themselves",
                "leave it at source",
            )
        if self.parse_special_tokens and all(s.content == "chat" for s in [*self.sources, *self.validation_sources]):
            invalid("parse_special_tokens", True, "applies to no source, all are chat", "remove it")
        for name in ("chat_template", "overlong", "train_on"):
            if not self.has_chat and getattr(self, name) != type(self).model_fields[name].default:
                invalid(name, getattr(self, name), "applies to no source", "set content: chat on one, or remove it")
        if self.has_preference and self.train_on != "all":
            invalid("train_on", self.train_on, "does not apply to preferences, whose answers are learned", "remove it")
        return self

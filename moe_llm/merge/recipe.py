"""What a recipe may say. The vocabulary is mergekit's, so that its files run as they are.

Beyond it: `align_experts`, `align_neurons`, `align_text`, `seed` and `recalibrate`; `merge_method: checkpoint_average`
and `greedy_soup`. Parts of mergekit's that are not here (`modules`, tokens of a `tokenizer`, LoRA) are refused.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from moe_llm.config.base import Section, fields_by_key, invalid, sentence
from moe_llm.config.load import read_yaml
from moe_llm.errors import UserError
from moe_llm.merge.parameters import check_settings

Settings = dict[str, Any]


class _WithParameters(Section):
    parameters: Settings = Field({}, description="weight, density, ...: a value, a gradient, or a list of filters")

    @field_validator("parameters", mode="before")
    @classmethod
    def _settings_are_well_formed(cls, value: Any) -> Any:
        return check_settings({} if value is None else value)


class Recalibration(Section):
    """The routers of the output, fitted on text with all else as it is."""

    text: list[str] = Field(min_length=1, description="files or globs")
    steps: int = Field(100, ge=1, description="of AdamW, the rate falling to 0")
    lr: float = Field(1e-3, gt=0, description="the first step's rate")
    batch_size: int = Field(8, ge=1, description="blocks a step")
    sequence_length: int = Field(512, ge=2, description="tokens a block, at most")


class _Recalibrated(Section):
    recalibrate: Recalibration | None = Field(None, description="fit the output's routers on text; null: as merged")


class InputModel(_WithParameters):
    model: str = Field(description="a checkpoint directory or a hub name")


class SliceSource(_WithParameters):
    model: str = Field(description="a checkpoint directory or a hub name")
    layer_range: tuple[int, int] = Field(description="first layer, and the one behind the last")

    @model_validator(mode="after")
    def _in_order(self):
        first, behind = self.layer_range
        if not 0 <= first < behind:
            invalid("layer_range", [first, behind], "holds no layers", "give [first, behind the last], from 0 upwards")
        return self


class OutputSlice(_WithParameters):
    sources: list[SliceSource] = Field(min_length=1, description="the layers that are merged into these")
    base_model: str | None = Field(None, description="of this slice; null: the recipe's")

    @model_validator(mode="after")
    def _as_many_layers(self):
        counts = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(counts)) > 1:
            invalid("sources", counts, "are numbers of layers that differ", "give layer_ranges of one length")
        return self


class TokenizerSettings(Section):
    source: str = Field("union", description="union, base, or a model")
    pad_to_multiple_of: int | None = Field(None, ge=1, description="rows of the embeddings are a multiple of this")


class Recipe(_WithParameters, _Recalibrated):
    """A merge of tensors of like shape."""

    merge_method: str = Field(description="a name of `moe_llm.merge.methods`")
    models: list[InputModel] | None = Field(None, min_length=1, description="whole models")
    slices: list[OutputSlice] | None = Field(None, min_length=1, description="layers, stacked in this order")
    base_model: str | None = Field(None, description="what task vectors are differences from; gives the tokenizer")
    dtype: str | None = Field(None, description="inputs are cast to it first; null: as stored")
    out_dtype: str | None = Field(None, description="of the output; null: dtype")
    tokenizer_source: str | None = Field(None, description="union, base, or a model; null: the base's, unchanged")
    tokenizer: TokenizerSettings | None = Field(None, description="the same with more settings")
    chat_template: str | None = Field(None, description="a Jinja template for the output's tokenizer")
    align_experts: Literal["none", "weights", "activations"] = Field(
        "none", description="match the experts of models without a common ancestor before merging"
    )
    align_neurons: bool = Field(False, description="also match the neurons within matched experts")
    align_text: list[str] | None = Field(None, description="activations: text files to compare the experts on")
    align_tokens: int = Field(2048, ge=1, description="activations: tokens of them that are used")
    seed: int = Field(0, ge=0, description="of random drops")

    @model_validator(mode="after")
    def _one_kind_of_input(self):
        if (self.models is None) == (self.slices is None):
            given = "both" if self.models else "neither"
            invalid("models", given, "and slices are alternatives", "give exactly one of models and slices")
        if self.tokenizer and self.tokenizer_source:
            invalid("tokenizer_source", self.tokenizer_source, "says the same as tokenizer", "remove one of them")
        if (self.align_experts == "activations") != (self.align_text is not None):
            invalid("align_text", self.align_text, "and align_experts: activations need each other", "give both")
        if self.align_neurons and self.align_experts == "none":
            invalid("align_neurons", True, "has no effect without align_experts", "set align_experts: weights")
        if self.chat_template:
            _check_template(self.chat_template)
        return self


def _check_template(text: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    if "{" not in text:
        invalid("chat_template", text, "is no template", "give the Jinja text itself")
    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiled, and with transformers' own tags
    except TemplateSyntaxError as error:
        invalid("chat_template", text, f"is no Jinja template ({error.message})", "repair it")


class Expert(Section):
    """A dense model whose feed-forward layers become one expert of each layer."""

    source_model: str = Field(description="a checkpoint directory or a hub name")
    positive_prompts: list[str] | None = Field(None, description="texts that should be routed here")
    negative_prompts: list[str] | None = Field(None, description="texts that should not")
    noise_scale: float | None = Field(None, ge=0, description="standard deviation of noise on the weights")
    residual_scale: float | None = Field(None, description="factor on down_proj")


class MixtureRecipe(_Recalibrated):
    """Dense models to a mixture of experts."""

    base_model: str = Field(description="gives all but the experts")
    experts: list[Expert] = Field(min_length=1, description="one expert of each layer from each of them")
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = Field(
        "hidden", description="router rows: hidden states of the prompts, their embeddings, or random"
    )
    dtype: str | None = Field(None, description="of the output; null: the base's")
    experts_per_token: int = Field(2, ge=1, description="experts that each token passes through")
    architecture: Literal["mixtral"] | None = Field(None, description="of the output")
    seed: int = Field(0, ge=0, description="of random gates and noise")

    @model_validator(mode="after")
    def _gates_can_be_made(self):
        if self.experts_per_token > len(self.experts):
            invalid(
                "experts_per_token",
                self.experts_per_token,
                f"is above the {len(self.experts)} experts",
                f"use at most {len(self.experts)}",
            )
        if self.gate_mode in ("random", "uniform_random"):
            return self
        for i, expert in enumerate(self.experts):
            if not expert.positive_prompts:
                invalid(
                    f"experts.{i}.positive_prompts",
                    expert.positive_prompts,
                    f"is needed by gate_mode: {self.gate_mode}",
                    "give a text or more, or gate_mode: random",
                )
        prompts = [(e.positive_prompts, e.negative_prompts or []) for e in self.experts]
        if len(prompts) > 1 and all(prompt == prompts[0] for prompt in prompts):
            invalid(
                "experts",
                "with one and the same prompts",
                "makes all router rows equal",
                "give each expert prompts of its own, or gate_mode: random",
            )
        return self


class CheckpointRecipe(_Recalibrated):
    """An average of a run's checkpoints: Polyak averaging where uniform, an exponential one with `decay`."""

    merge_method: Literal["checkpoint_average"]
    run: str = Field(description="a run directory")
    last: int = Field(5, ge=1, description="checkpoints, counted from the newest")
    decay: float | None = Field(
        None, gt=0, le=1, description="each weighs this times the next newer one; null: all alike"
    )
    dtype: str | None = Field(None, description="of the output; null: as stored")


class SoupRecipe(Section):
    """Greedy soup, Wortsman et al. 2022, recipe 1: a model stays in the average only where it lowers the loss."""

    merge_method: Literal["greedy_soup"]
    models: list[InputModel] = Field(min_length=1, description="fine-tunes of one base")
    data: list[str] = Field(min_length=1, description="validation text: files or globs")
    max_blocks: int | None = Field(None, ge=1, description="validation blocks used; null: all")
    batch_size: int = Field(8, ge=1, description="blocks a batch")
    dtype: str | None = Field(None, description="of the output; null: as stored")

    @model_validator(mode="after")
    def _models_alone(self):
        for i, item in enumerate(self.models):
            if item.parameters:
                invalid(
                    f"models.{i}.parameters",
                    item.parameters,
                    "has no effect here: a soup weighs all alike",
                    "remove it",
                )
        return self


AnyRecipe = Recipe | MixtureRecipe | CheckpointRecipe | SoupRecipe
_BY_METHOD: dict[str, type[CheckpointRecipe] | type[SoupRecipe]] = {
    "checkpoint_average": CheckpointRecipe,
    "greedy_soup": SoupRecipe,
}


def load_recipe(path: str | Path) -> AnyRecipe:
    """Read a recipe.

    Raises:
        UserError: one sentence that names the field, its value and the remedy.
    """
    return parse_recipe(read_yaml(path, "recipe"), str(path))


def recipe_text(recipe: AnyRecipe) -> str:
    """A recipe as YAML, without what is at its default."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


def parse_recipe(raw: Any, origin: str = "recipe") -> AnyRecipe:
    """Check a recipe's content; `origin` names it in errors."""
    if not isinstance(raw, dict):
        raise UserError(f"{origin} is no recipe: it needs at least merge_method and models")
    if raw.get("modules") is not None:
        raise UserError(f"{origin}: modules is not supported: give models or slices, for there is one module here")
    if "experts" in raw:
        kind: type[AnyRecipe] = MixtureRecipe
    else:
        method = raw.get("merge_method")
        kind = _BY_METHOD.get(method, Recipe) if isinstance(method, str) else Recipe
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        known = {key for section in _sections(kind) for key in fields_by_key(section)}
        raise UserError(f"{origin}: {sentence(dict(error.errors()[0]), known)}") from error


def _sections(kind: type[AnyRecipe]) -> list[type[Section]]:
    nested: dict[type, list[type[Section]]] = {
        Recipe: [InputModel, OutputSlice, SliceSource, TokenizerSettings],
        MixtureRecipe: [Expert],
    }
    return [kind, Recalibration, *nested.get(kind, [InputModel])]

"""What an ensemble's file may say.

    method: linear                     # log_linear, contextual, experts, cascade, mc_dropout, chain, stacking, ...
    members:
      - {model: runs/a/checkpoints/latest, weight: 0.7}
      - {model: runs/b/checkpoints/latest, weight: 0.3, device: cuda:1}

The main model, which generates and whose tokenizer the text is measured in, is the first member or, where members
have roles, the core, the small or the first one.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from moe_llm.config.base import HomePath, Section, fields_by_key, invalid, sentence
from moe_llm.config.load import read_yaml
from moe_llm.errors import UserError


class Member(Section):
    model: HomePath = Field(description="a checkpoint directory or a hub name")
    device: str | None = Field(None, description="such as cpu or cuda:1; null: the first GPU, or the CPU without one")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="of the weights; null: as stored")


class WeightedMember(Member):
    weight: float | None = Field(None, description="in the mixture or the product; null, of all: equal shares")


class ExpertsMember(Member):
    role: Literal["core", "positive", "negative"]


class CascadeMember(Member):
    role: Literal["small", "large"]


class StackingMember(Member):
    role: Literal["first", "second"]


class RefiningMember(Member):
    role: Literal["writer", "critic"]


class _Fitted(Section):
    """What of a recipe comes from text."""

    data: list[str] | None = Field(None, min_length=1, description="text to fit on: files or globs")
    max_blocks: int | None = Field(None, ge=1, description="blocks of data used; null: all")

    @property
    @abstractmethod
    def to_fit(self) -> str | None:
        """The key that is to be fitted before the ensemble can be used."""

    @model_validator(mode="after")
    def _data_has_a_use(self):
        for key in ("data", "max_blocks"):
            if getattr(self, key) is not None and self.to_fit is None:
                invalid(key, getattr(self, key), "has no effect, for nothing is to be fitted", "remove it")
        return self


class _Weighted(_Fitted):
    members: list[WeightedMember] = Field(min_length=1, description="the first one is the main model")
    weights: Literal["given", "fit"] = Field("given", description="fit: from data, before anything else")

    @property
    def to_fit(self) -> str | None:
        return "weights=fit" if self.weights == "fit" else None

    @model_validator(mode="after")
    def _all_have_weights_or_none(self):
        given = [member.weight for member in self.members]
        if self.weights == "fit" and given != [None] * len(given):
            invalid("members", given, "are weights that would be fitted anyway", "remove them or weights: fit")
        if None in given and given != [None] * len(given):
            at = given.index(None)
            invalid(f"members.{at}.weight", None, "is missing beside weights of others", "give all a weight or none")
        if None not in given and not any(given):
            invalid("members", given, "are weights of which none counts", "give at least one that is not 0")
        return self

    @property
    def shares(self) -> list[float]:
        """The members' weights, with equal ones where none are given."""
        return [1 / len(self.members) if m.weight is None else m.weight for m in self.members]

    def with_shares(self, shares: Sequence[float]) -> Self:
        """The same with these weights."""
        members = [m.model_copy(update={"weight": float(w)}) for m, w in zip(self.members, shares)]
        return self.model_copy(update={"members": members, "weights": "given", "data": None, "max_blocks": None})


class LinearRecipe(_Weighted):
    """A mixture of the members' next-token probabilities; weights are relative."""

    method: Literal["linear"]

    @model_validator(mode="after")
    def _no_weight_is_negative(self):
        for i, member in enumerate(self.members):
            if member.weight is not None and member.weight < 0:
                invalid(
                    f"members.{i}.weight",
                    member.weight,
                    "is negative, which a probability cannot be",
                    "use method: log_linear or experts",
                )
        return self

    @property
    def shares(self) -> list[float]:
        given = super().shares
        return [weight / math.fsum(given) for weight in given]


class LogLinearRecipe(_Weighted):
    """A product of the members' next-token probabilities, each to the power of its weight, renormalised."""

    method: Literal["log_linear"]


class Gate(Section):
    """softmax(weight f + bias): the members' weights for features f."""

    weight: list[list[float]] = Field(description="a row for each member")
    bias: list[float]


class ContextualRecipe(_Fitted):
    """A mixture whose weights are a small function of the context, fitted on text."""

    method: Literal["contextual"]
    members: list[Member] = Field(min_length=2, description="the first one is the main model; all are different")
    features: Literal["losses", "hidden"] = Field(
        "losses",
        description="what the weights go by. losses: each member's mean loss on the tokens just before; hidden: the main "
        "model's last hidden state",
    )
    window: int | None = Field(None, ge=1, description="losses: tokens that they are of, at most; null: 32")
    penalty: float = Field(1e-4, ge=0, description="on the squares of what is fitted, for features of deviation 1")
    gate: Gate | None = Field(None, description="null: to be fitted")

    @property
    def tokens(self) -> int:
        """Of the window."""
        return self.window or 32

    @property
    def to_fit(self) -> str | None:
        return "gate" if self.gate is None else None

    @model_validator(mode="after")
    def _complete(self):
        if self.window is not None and self.features != "losses":
            invalid("window", self.window, f"has no effect on features={self.features}", "remove it")
        gate, members = self.gate, len(self.members)
        if gate is not None and (len(gate.weight), len(gate.bias)) != (members, members):
            shape = [len(gate.weight), len(gate.bias)]
            invalid("gate", shape, f"are rows of weight and bias for {members} members", "fit it anew")
        if gate is not None and len({len(row) for row in gate.weight}) > 1:
            invalid("gate.weight", [len(row) for row in gate.weight], "are rows of unequal length", "fit it anew")
        return self

    def with_gate(self, gate: Gate) -> "ContextualRecipe":
        return self.model_copy(update={"gate": gate, "data": None, "max_blocks": None})


class ExpertsRecipe(_Fitted):
    """core + lambda (positive - negative), on logits: DExperts, Liu et al. 2021, equation 1; domain adaptation.

    The core stands in for whichever of the two others is missing.
    """

    method: Literal["experts"]
    members: list[ExpertsMember]
    lambda_: float | Literal["fit"] = Field(1.0, alias="lambda", description="strength; 0: the core alone")

    @field_validator("lambda_", mode="before")
    @classmethod
    def _a_number_or_fit(cls, value: Any) -> Any:
        if value != "fit" and not (isinstance(value, (int, float)) and math.isfinite(value)):
            invalid("", value, "is no number", "give a number or fit")
        return value

    @model_validator(mode="after")
    def _roles(self):
        _check_roles(self.members, ["core"])
        if len(self.members) == 1:
            invalid("members", ["core"], "leaves nothing to add", "add a positive or a negative one")
        return self

    @property
    def to_fit(self) -> str | None:
        return "lambda=fit" if self.lambda_ == "fit" else None

    def with_strength(self, strength: float) -> "ExpertsRecipe":
        return self.model_copy(update={"lambda_": float(strength), "data": None, "max_blocks": None})


class CascadeRecipe(_Fitted):
    """A small model answers where it is confident, the large one where not."""

    method: Literal["cascade"]
    members: list[CascadeMember]
    per: Literal["token", "request"] = Field(
        "token", description="token: by the small one's largest probability; request: by its answer's mean one"
    )
    threshold: float | None = Field(None, ge=0, le=1, description="confidence from which on the small one's word holds")
    budget: float | None = Field(None, ge=0, le=1, description="share left to the large one: the threshold is fitted")

    @model_validator(mode="after")
    def _one_of_both(self):
        _check_roles(self.members, ["small", "large"])
        if (self.threshold is None) == (self.budget is None):
            given = "missing, and so is budget" if self.budget is None else "given, and so is budget"
            invalid("threshold", self.threshold, f"is {given}", "give exactly one of them")
        return self

    @property
    def to_fit(self) -> str | None:
        return None if self.budget is None else f"budget={self.budget}"

    def with_threshold(self, threshold: float) -> "CascadeRecipe":
        return self.model_copy(update={"threshold": float(threshold), "budget": None, "data": None, "max_blocks": None})


class McDropoutRecipe(Section):
    """One checkpoint, run several times with dropout on, whose mean distribution answers (Gal and Ghahramani 2016)."""

    method: Literal["mc_dropout"]
    members: list[Member] = Field(min_length=1, max_length=1, description="the checkpoint")
    passes: int = Field(8, ge=2, description="times that it is run for each token, each with draws of its own")
    dropout: float = Field(0.1, gt=0, lt=1, description="share of the feed-forward layers' outputs that is set to zero")
    seed: int = Field(0, ge=0, description="of the draws")

    @property
    def to_fit(self) -> str | None:
        return None

    @property
    def shares(self) -> list[float]:
        """Of the passes."""
        return [1 / self.passes] * self.passes


class StackingRecipe(Section):
    """The second model sees the input and what the first one made of it (after Wolpert 1992)."""

    method: Literal["stacking"]
    members: list[StackingMember]
    template: str = Field(
        "{input}\n\nA first answer:\n{output}\n\nA better answer:\n", description="what the second model continues"
    )
    chat: bool = Field(False, description="prompts are user turns of the tokenizer's chat template")

    @model_validator(mode="after")
    def _complete(self):
        _check_roles(self.members, ["first", "second"])
        _check_template("template", self.template, ["input", "output"])
        return self


class SelfRefineRecipe(Section):
    """Draft, critique, revise, for some rounds: Self-Refine, Madaan et al. 2023. Without a critic, the writer is it."""

    method: Literal["self_refine"]
    members: list[RefiningMember]
    rounds: int = Field(1, ge=1, description="of critique and revision")
    critique: str = Field(
        "Task:\n{input}\n\nAnswer:\n{draft}\n\nWhat is wrong with this answer, and how is it mended?\n",
        description="what the critic continues",
    )
    revise: str = Field(
        "Task:\n{input}\n\nAnswer:\n{draft}\n\nCriticism:\n{critique}\n\nThe answer, mended:\n",
        description="what the writer continues",
    )
    stop: str | None = Field(None, min_length=1, description="a criticism that holds this text ends the rounds")
    chat: bool = Field(False, description="prompts are user turns of the tokenizer's chat template")

    @model_validator(mode="after")
    def _complete(self):
        _check_roles(self.members, ["writer"])
        _check_template("critique", self.critique, ["draft"])
        _check_template("revise", self.revise, ["draft", "critique"])
        return self


class ChainMember(Member):
    template: str = Field("{output}", description="what it continues: {input} of the chain, {output} of the one before")


class ChainRecipe(Section):
    """Text-to-text steps: each model's output is the next one's input, the n best passed on."""

    method: Literal["chain"]
    members: list[ChainMember] = Field(min_length=1, description="in order; the first one's {output} is the input")
    n_best: int = Field(1, ge=1, description="outputs that are passed on, those of the highest score")
    chat: bool = Field(False, description="prompts are user turns of the tokenizer's chat template")

    @model_validator(mode="after")
    def _complete(self):
        for i, member in enumerate(self.members):
            if "{output}" not in member.template and "{input}" not in member.template:
                lacks = "lacks {output} and {input}"
                invalid(f"members.{i}.template", member.template, lacks, "write one where the text belongs")
            if i and "{output}" not in member.template:
                invalid(f"members.{i}.template", member.template, "lacks {output}", "write it where the text belongs")
        return self


class EditsRecipe(Section):
    """A draft is corrupted and restored, round by round, ever more lightly (after Diffuser, Reid et al. 2022)."""

    method: Literal["edits"]
    members: list[Member] = Field(
        min_length=1, max_length=1, description="the model, trained on data with augment: edits"
    )
    rounds: int = Field(4, ge=1, description="of corruption and restoration")
    rate: float = Field(0.4, gt=0, le=1, description="share of the words that the first round edits; falls evenly to 0")
    template: str = Field("{draft}\n=>\n", description="what the model continues; {input} is the prompt")
    seed: int = Field(0, ge=0, description="of the corruption")
    chat: bool = Field(False, description="prompts are user turns of the tokenizer's chat template")

    @model_validator(mode="after")
    def _complete(self):
        _check_template("template", self.template, ["draft"])
        return self


FittedRecipe = LinearRecipe | LogLinearRecipe | ContextualRecipe | ExpertsRecipe | CascadeRecipe | McDropoutRecipe
RequestRecipe = StackingRecipe | SelfRefineRecipe | ChainRecipe | EditsRecipe
AnyRecipe = FittedRecipe | RequestRecipe
METHODS: dict[str, type[Section]] = {
    "linear": LinearRecipe,
    "log_linear": LogLinearRecipe,
    "contextual": ContextualRecipe,
    "experts": ExpertsRecipe,
    "cascade": CascadeRecipe,
    "mc_dropout": McDropoutRecipe,
    "stacking": StackingRecipe,
    "self_refine": SelfRefineRecipe,
    "chain": ChainRecipe,
    "edits": EditsRecipe,
}
_MEMBERS = (WeightedMember, ExpertsMember, ChainMember, Gate)  # the keys of all others are among theirs


def load_recipe(path: str | Path) -> AnyRecipe:
    """Read an ensemble's file.

    Raises:
        UserError: one sentence that names the field, its value and the remedy.
    """
    return parse_recipe(read_yaml(path, "ensemble file"), str(path))


def parse_recipe(raw: Any, origin: str = "ensemble") -> AnyRecipe:
    """Check a recipe's content; `origin` names it in errors."""
    if not isinstance(raw, dict) or "method" not in raw:
        raise UserError(f"{origin} describes no ensemble: it needs at least method and members")
    method = raw["method"]
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"{origin}: method={method!r} is no method: use one of {', '.join(METHODS)}")
    kind: type[Any] = METHODS[method]
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        known = {key for section in (kind, *_MEMBERS) for key in fields_by_key(section)}
        raise UserError(f"{origin}: {sentence(dict(error.errors()[0]), known)}") from error


def recipe_text(recipe: AnyRecipe) -> str:
    """A recipe as YAML, without what is at its default."""
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def by_role(recipe: ExpertsRecipe | CascadeRecipe | StackingRecipe | SelfRefineRecipe) -> dict[str, int]:
    """The members' indices by role."""
    members: Sequence[Any] = recipe.members
    return {member.role: i for i, member in enumerate(members)}


def _check_roles(members: Sequence[Any], needed: list[str]) -> None:
    roles = [member.role for member in members]
    for i, role in enumerate(roles):
        if role in roles[:i]:
            invalid(f"members.{i}.role", role, "is taken already", "give each role once")
    for role in needed:
        if role not in roles:
            invalid("members", roles, f"are roles without {role}", f"add a member with role: {role}")


def _check_template(key: str, text: str, needed: list[str]) -> None:
    for name in needed:
        if "{" + name + "}" not in text:
            invalid(key, text, f"lacks {{{name}}}", "write it where the text belongs")

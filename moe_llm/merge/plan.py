"""From a recipe to one job for each tensor of the output. Everything that can be wrong is found here.

As in mergekit: `models` are one slice of all layers; a base that is not among the models joins them as the last; the
embedding comes from the first slice's sources, final norm and head from the last one's, both at depth 0.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_llm.errors import UserError
from moe_llm.merge.activations import check_text
from moe_llm.merge.align import Aligner
from moe_llm.merge.job import Copy, Input, Job, Reader
from moe_llm.merge.methods import METHODS, Method
from moe_llm.merge.models import EMBEDDING, HEAD, NORM, Model, check_alike, layer_tensor, other_tokens
from moe_llm.merge.parameters import filters, matches, resolve
from moe_llm.merge.recipe import OutputSlice, Recipe, SliceSource
from moe_llm.merge.vocabulary import Vocabulary, build_vocabulary

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass
class MergePlan:
    """What is written: tensors in order, and what the files beside them are made from.

    donor: whose config.json and tokenizer the output gets. changes: to that config.json, which loses the keys `left_out`.
    notes: sentences to say.
    layers_from: (model, its layer) that settings of each layer of the output come from.
    """

    kind: str
    donor: Model
    models: list[Model]
    tensors: list[Job | Copy]
    changes: dict[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)
    layers_from: list[tuple[Model, int]] = field(default_factory=list)
    aligner: Aligner | None = None
    left_out: Collection[str] = ()


def read_dtype(text: str | None, field_name: str) -> torch.dtype | None:
    """The dtype that a recipe names.

    Raises:
        UserError: another word.
    """
    if text is None:
        return None
    if text in DTYPES:
        return DTYPES[text]
    raise UserError(f"{field_name}={text!r} is no dtype of an output: use float32, bfloat16 or float16")


def make_plan(recipe: Recipe) -> MergePlan:
    """Open the models of a recipe and lay out its output.

    Raises:
        UserError: whatever is wrong with the recipe or the models, before anything is written.
    """
    return _Planner(recipe).plan()


class _Planner:
    def __init__(self, recipe: Recipe):
        self.recipe, self.method = recipe, _method(recipe.merge_method)
        self.cast = read_dtype(recipe.dtype, "dtype")
        self.out = read_dtype(recipe.out_dtype, "out_dtype") or self.cast
        self.models = {name: Model(name) for name in _references(recipe)}
        self.slices = self._slices()
        first = list(self.models.values())
        self.donor = self.models[recipe.base_model] if recipe.base_model else first[0]
        first.sort(key=lambda model: model is not self.donor)
        self.notes = check_alike(first) + _check_parameters(recipe, self.slices, self.method)
        self.vocabulary = self._vocabulary(first)
        if self.vocabulary is None:
            self.notes += other_tokens(first)
        self.aligner = None
        if recipe.align_experts == "activations":
            assert recipe.align_text is not None, "the recipe refuses activations without align_text"
            check_text(recipe.align_text, first)
        if recipe.align_experts != "none":
            self.aligner = Aligner(recipe.align_experts, recipe.align_neurons, recipe.align_text, recipe.align_tokens)

    def plan(self) -> MergePlan:
        for piece in self.slices:
            self._check_slice(piece)
        jobs = list(self._tensors())
        _check_filters(self.recipe, self.slices, [job.name for job in jobs])
        layers = [
            (self._reference(piece), source.layer_range[0] + i)
            for piece in self.slices
            for source in [self._reference_source(piece)]
            for i in range(source.layer_range[1] - source.layer_range[0])
        ]
        changes = {"num_hidden_layers": len(layers), "tie_word_embeddings": self._tied()}
        if self.vocabulary is not None:
            changes["vocab_size"] = self.vocabulary.size
        return MergePlan(
            self.donor.kind,
            self.donor,
            list(self.models.values()),
            [*jobs],
            changes,
            self.vocabulary,
            self.recipe.chat_template,
            self.notes,
            layers,
            self.aligner,
        )

    def _slices(self) -> list[OutputSlice]:
        recipe = self.recipe
        if recipe.slices is not None:
            return recipe.slices
        assert recipe.models is not None, "a recipe has models or slices"
        items = [(item.model, item.parameters) for item in recipe.models]
        if recipe.base_model is not None and recipe.base_model not in [name for name, _ in items]:
            items.append((recipe.base_model, {}))
        counts = {self.models[name].layers for name, _ in items}
        if len(counts) > 1:
            had = ", ".join(f"{name} has {self.models[name].layers}" for name, _ in items)
            raise UserError(f"the models have different numbers of layers ({had}): give slices with layer_range")
        sources = [
            SliceSource(model=name, layer_range=(0, self.models[name].layers), parameters=parameters)
            for name, parameters in items
        ]
        return [OutputSlice(sources=sources)]

    def _vocabulary(self, models: list[Model]) -> Vocabulary | None:
        given = self.recipe.tokenizer
        source = given.source if given else self.recipe.tokenizer_source
        if source is None:
            return None
        return build_vocabulary(source, models, self.recipe.base_model, given.pad_to_multiple_of if given else None)

    def _base(self, piece: OutputSlice) -> str | None:
        return piece.base_model or self.recipe.base_model

    def _reference_source(self, piece: OutputSlice) -> SliceSource:
        """The source that others are aligned to: the base or, without one, the first."""
        return next((s for s in piece.sources if s.model == self._base(piece)), piece.sources[0])

    def _reference(self, piece: OutputSlice) -> Model:
        return self.models[self._reference_source(piece).model]

    def _check_slice(self, piece: OutputSlice) -> None:
        names, base = [source.model for source in piece.sources], self._base(piece)
        what = self.recipe.merge_method
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"model {twice!r} is an input twice: give its weights in one place")
        if self.method.needs_base and base not in names:
            why = "base_model is missing" if base is None else f"base_model={base!r} is not among a slice's sources"
            raise UserError(f"{why}, and {what} needs it: add it")
        most = self.method.most if self.method.most is not None else len(names)
        if not self.method.least <= len(names) <= most:
            least = self.method.least
            wanted = (
                f"at least {least}"
                if self.method.most is None
                else f"{least} to {most}"
                if most > least
                else f"{least}"
            )
            raise UserError(f"{what} takes {wanted} models, and {len(names)} are given ({', '.join(names)})")
        for source in piece.sources:
            layers = self.models[source.model].layers
            if source.layer_range[1] > layers:
                raise UserError(
                    f"layer_range={list(source.layer_range)} of {source.model} goes beyond its {layers} layers: "
                    f"end at {layers} at most"
                )

    def _tied(self) -> bool:
        names = {source.model for piece in (self.slices[0], self.slices[-1]) for source in piece.sources}
        return all(self.models[name].tied for name in names)

    def _tensors(self) -> Iterator[Job]:
        yield self._outer(EMBEDDING, self.slices[0])
        layer = 0
        for piece in self.slices:
            first, behind = piece.sources[0].layer_range
            for i in range(behind - first):
                yield from self._layer(piece, i, layer, i / (behind - first - 1) if behind - first > 1 else 1.0)
                layer += 1
        yield self._outer(NORM, self.slices[-1])
        if not self._tied():
            yield self._outer(HEAD, self.slices[-1])

    def _outer(self, name: str, piece: OutputSlice) -> Job:
        readers: list[tuple[Reader, str]] = []
        for source in piece.sources:
            model = self.models[source.model]
            everyone = [self.models[s.model] for s in piece.sources]
            readers.append((self.vocabulary.reader(model, everyone) if self.vocabulary else model, name))
        return self._job(name, piece, readers, 0.0)

    def _layer(self, piece: OutputSlice, offset: int, layer: int, depth: float) -> Iterator[Job]:
        layers = [source.layer_range[0] + offset for source in piece.sources]
        models = [self.models[source.model] for source in piece.sources]
        readers: list[Reader] = list(models)
        dense = models[0].config is not None and not all(m.has_experts(i) for m, i in zip(models, layers))
        if self.aligner is not None and len(models) > 1 and not dense:
            at = piece.sources.index(self._reference_source(piece))
            readers = [
                model if i == at else self.aligner.reader(models[at], layers[at], model, layers[i])
                for i, model in enumerate(models)
            ]
        shapes = [model.layer_shapes(i) for model, i in zip(models, layers)]
        for other, model in zip(shapes[1:], models[1:]):
            if unlike := [suffix for suffix in {**shapes[0], **other} if (suffix in shapes[0]) != (suffix in other)]:
                raise UserError(
                    f"{layer_tensor(layer, unlike[0])} is in only one of {models[0].reference} and {model.reference}: "
                    "give models of one architecture"
                )
        for suffix in shapes[0]:
            named = [(reader, layer_tensor(i, suffix)) for reader, i in zip(readers, layers)]
            yield self._job(layer_tensor(layer, suffix), piece, named, depth)

    def _job(self, name: str, piece: OutputSlice, named: list[tuple[Reader, str]], depth: float) -> Job:
        shapes = [tuple(reader.shapes[own]) for reader, own in named]
        for source, shape in zip(piece.sources, shapes):
            if shape != shapes[0]:
                tokens = name in (EMBEDDING, HEAD) and shape[1:] == shapes[0][1:]
                remedy = "set tokenizer_source: union" if tokens else "give models of one shape"
                raise UserError(
                    f"{name} is {list(shapes[0])} in {piece.sources[0].model} and {list(shape)} in {source.model}: "
                    f"{remedy}"
                )
        scopes = [piece.parameters, self.recipe.parameters]
        base = next((i for i, source in enumerate(piece.sources) if source.model == self._base(piece)), None)
        of_tasks = self.method.needs_base or self.method.takes_base
        inputs = []
        for i, (source, (reader, own)) in enumerate(zip(piece.sources, named)):
            wanted = ("input",) if i == base and of_tasks else ("input", "task")
            inputs.append(Input(reader, own, {
                key: resolve(key, parameter, [source.parameters, *scopes], own, depth, f" of {source.model}")
                for key, parameter in self.method.parameters.items() if parameter.scope in wanted
            }))  # fmt: skip
        shared = {
            key: resolve(key, parameter, scopes, name, depth, "")
            for key, parameter in self.method.parameters.items() if parameter.scope == "shared"
        }  # fmt: skip
        buffer = self.donor.is_buffer(name)  # in fp32 throughout, as models hold it
        dtype = (torch.float32 if buffer else self.out) or common_dtype([reader.dtype(own) for reader, own in named])
        cast = None if buffer else self.cast
        job = Job(name, shapes[0], dtype, inputs, self.method.start, base, shared, cast, self.recipe.seed)
        if self.method.check is not None:
            self.method.check(job)
        return job


def _method(name: str) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        known = f"did you mean {near[0]}?" if near else f"use one of {', '.join(METHODS)}"
        raise UserError(f"merge_method={name!r} is not known: {known}")
    return METHODS[name]


def _references(recipe: Recipe) -> list[str]:
    """Every model that a recipe names, once, in order."""
    sources = [source for piece in recipe.slices or () for source in piece.sources]
    names = [item.model for item in recipe.models or ()] + [source.model for source in sources]
    return list(dict.fromkeys(names + ([recipe.base_model] if recipe.base_model else [])))


def _sections(recipe: Recipe, slices: list[OutputSlice]) -> list[Mapping[str, Any]]:
    sources = [source for piece in slices for source in piece.sources]
    return [recipe.parameters, *(x.parameters for x in slices), *(x.parameters for x in sources)]


def _check_parameters(recipe: Recipe, slices: list[OutputSlice], method: Method) -> list[str]:
    """Refuse unknown parameters; say which known ones this method makes no use of, as recipes may carry them along."""
    known = {name for other in METHODS.values() for name in other.parameters}
    given = dict.fromkeys(name for section in _sections(recipe, slices) for name in section)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            takes = f"{recipe.merge_method} takes {', '.join(method.parameters)}"
            raise UserError(f"unknown parameter {name}: " + (f"did you mean {near[0]}?" if near else takes))
    return [f"{recipe.merge_method} makes no use of {name}" for name in given if name not in method.parameters]


def _check_filters(recipe: Recipe, slices: list[OutputSlice], names: list[str]) -> None:
    for word in sorted(filters(_sections(recipe, slices))):
        if not any(matches(word, name) for name in (*names, HEAD)):
            raise UserError(f"filter={word!r} is in no tensor's name: give a part of one, as in {names[1]}")


def common_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds all of these."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result

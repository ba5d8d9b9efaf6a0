"""The tensors of a directory under the model's names: in whatever style stored, checked, in parts."""

import functools
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import EllipsisType

import torch

from moe_llm.checkpoint.safetensors_io import TensorFiles
from moe_llm.errors import UserError
from moe_llm.families import hf, layout

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # whose values bf16 holds exactly
Index = tuple[int, slice] | tuple[int] | EllipsisType


class Weights:
    """The tensors of `files` whose names begin with `prefix`, by in-memory names.

    Per-expert and stacked experts are understood, under `block_sparse_moe` and under `mlp`.

    failures: collects what is wrong with tensors that are read, in whose place zeros are given; None: it is raised.
    dense: the files are of a model without experts, which is not to be read as one of one expert in each layer.
    """

    def __init__(
        self, files: TensorFiles, prefix: str = "", failures: list[UserError] | None = None, dense: bool = False
    ):
        self.files, self.prefix, self._failures = files, prefix, failures
        self._stored: dict[str, str] = {}  # published name -> name in the files
        for stored in files.names():
            name = hf.published_name(stored.removeprefix(prefix))
            if not stored.startswith(prefix) or hf.is_derived(name):
                continue
            if name in self._stored:
                raise UserError(
                    f"tensors {self._stored[name]} and {stored} of {files.directory} are one and the same "
                    "weight: remove one"
                )
            self._stored[name] = stored
        if not (prefix or dense or any(".experts." in name for name in self._stored)):
            self._stored = {hf.of_the_only_expert(name): stored for name, stored in self._stored.items()}
        # GPT-OSS's layout; no other family has biases of all experts in one tensor
        self.interleaved = any(name.endswith(".experts.gate_up_proj_bias") for name in self._stored)
        beyond = self._next_token_layers()
        self._stored = {name: stored for name, stored in self._stored.items() if _layer(name) not in beyond}

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], optional: Iterable[str] = (), experts: Container[int] | None = None
    ) -> None:
        """Demand exactly these parameters, each of its whole shape; those in `optional` may be there besides.

        Args:
            experts: the only ones that are stored; None: all.

        Raises:
            UserError: names the tensors that are missing, unexpected, of another shape or no floating-point numbers.
        """
        expected, allowed = dict[str, tuple[int, ...]](), set(optional)
        for name, shape in shapes.items():
            if self._stacked(name) is not None:
                whole = layout.stacked_shape(name, tuple(shape)) if self.interleaved else tuple(shape)
                expected[hf.published_name(name)] = whole
            else:
                expected |= {
                    piece.name: piece.shape
                    for piece in hf.pieces(name, shape)
                    if experts is None or piece.index is ... or piece.index[0] in experts
                }
        missing = [name for name in expected if name not in self._stored]
        unexpected = [name for name in self._stored if name not in expected and name not in allowed]
        misshapen = [
            f"{name} {list(self.files.shape(self._stored[name]))} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in self._stored and self.files.shape(self._stored[name]) != shape
        ]
        whole_numbers = [
            f"{name} ({self.files.dtype(self._stored[name])})"
            for name in expected
            if name in self._stored and not self.files.dtype(self._stored[name]).is_floating_point
        ]
        problems = [
            f"{what} {_some(names)}"
            for what, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", misshapen),
                ("of whole numbers", whole_numbers),
            )
            if names
        ]
        if problems:
            kind = f" ({self.prefix.rstrip('.')})" if self.prefix else ""
            raise UserError(
                f"{self.files.directory} does not hold this model's tensors{kind}: {'; '.join(problems)}: "
                "give a checkpoint of the same architecture"
            )

    def stored(self) -> Mapping[str, str]:
        """Name in the files of every tensor, by published name."""
        return self._stored

    def has(self, name: str) -> bool:
        """Whether a dense parameter of this in-memory name is stored."""
        return hf.published_name(name) in self._stored

    def without_unused(
        self, shapes: Mapping[str, tuple[int, ...]], unused: tuple[str, ...]
    ) -> dict[str, tuple[int, ...]]:
        """`shapes` without the parameters named in `unused` where none of these is stored, as transformers leaves a
        model's files that it has read and written again."""
        named = [name for name in shapes if unused and name.endswith(unused)]
        if any(map(self.has, named)):
            return dict(shapes)
        return {name: shape for name, shape in shapes.items() if name not in named}

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a dense parameter; fp32 where it is not stored."""
        stored = self._stored.get(hf.published_name(name))
        return torch.float32 if stored is None else self.files.dtype(stored)

    def widest_dtype(self, without: Container[str] = ()) -> torch.dtype:
        """A dtype that holds every stored tensor exactly: what fine-tuning has left as it was may be in another one.

        without: published names of tensors that have a dtype of their own.
        """
        dtypes = {self.files.dtype(stored) for name, stored in self._stored.items() if name not in without}
        dtypes = {torch.bfloat16 if dtype in _FLOAT8 else dtype for dtype in dtypes}  # torch promotes none of 8 bits
        return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    def parts(
        self, name: str, shape: tuple[int, ...], first_expert: int | None = None
    ) -> Iterator[tuple[Index, torch.Tensor]]:
        """Yield (index, tensor) with `parameter[index]` = tensor, a matrix at a time; reads no other expert.

        Args:
            shape: of the parameter as held here; dimension 0 counts the held experts of an expert parameter.
            first_expert: over all ranks, of the first expert held; None: 0.
        """
        stacked = self._stacked(name)
        if stacked is None:
            for piece in hf.pieces(name, shape, first_expert):
                yield piece.index, self._finite(self._stored[piece.name])
            return
        first = first_expert or 0
        for e in range(shape[0]):
            one = self._finite(stacked, slice(first + e, first + e + 1))
            yield (e,), (layout.from_stacked(name, one) if self.interleaved else one)[0]

    def _finite(self, stored: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or rows of it."""
        shape = self.files.shape(stored)
        count = shape[0] if rows is None else rows.stop - rows.start
        return self._sound(stored, lambda: self.files.read(stored, rows), (count, *shape[1:]) if shape else shape)

    def _sound(self, stored: str, read: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """What `read` gives of a tensor; zeros of this shape where it fails and `failures` are collected.

        Raises:
            UserError: a damaged file, or a weight that holds NaN or infinity, from which nothing sound can be computed.
        """
        try:
            tensor = read()
            if self.prefix == "" and tensor.is_floating_point():
                check_finite(tensor, stored, self.files.file(stored))
        except UserError as failure:
            if self._failures is None:
                raise
            self._failures.append(failure)
            return torch.zeros(shape, dtype=self.files.dtype(stored))
        return tensor

    def read_span(self, name: str, shape: tuple[int, ...], first_expert: int | None, span: range) -> torch.Tensor:
        """The elements `span` of a parameter as held here, counted in the order in which they lie: (len(span),) fp32.
        No others are read."""
        if self._stacked(name) is not None:
            return self.read(name, shape, first_expert).flatten()[span.start : span.stop]
        flat, begin = torch.empty(len(span), dtype=torch.float32), 0
        for piece in hf.pieces(name, shape, first_expert):
            count = math.prod(piece.shape)
            first, last = max(begin, span.start), min(begin + count, span.stop)
            if first < last:
                stored = self._stored[piece.name]
                read = functools.partial(self.files.read_span, stored, first - begin, last - first)
                flat[first - span.start : last - span.start] = self._sound(stored, read, (last - first,))
            begin += count
        return flat

    def read(self, name: str, shape: tuple[int, ...], first_expert: int | None = None) -> torch.Tensor:
        """A parameter as held here, fp32."""
        whole = torch.empty(shape, dtype=torch.float32)
        for index, part in self.parts(name, shape, first_expert):
            whole[index] = part
        return whole

    def as_stored(self, name: str, shape: tuple[int, ...], expert: int | None = None) -> torch.Tensor:
        """A dense parameter, or one expert's matrix of a stacked one, in its stored dtype.

        Args:
            shape: of the dense parameter, or of the expert's matrix in memory.
            expert: over all ranks; None for a dense parameter.
        """
        if expert is None:
            [(_, whole)] = self.parts(name, shape)
            return whole
        return torch.cat([part for _, part in self.parts(name, (1, *shape), expert)])

    def _next_token_layers(self) -> set[str]:
        """Layers beyond the decoder's that guess further tokens (DeepSeek-V3, GLM-4-MoE): transformers leaves them out."""
        return {_layer(name) for name in self._stored if name.endswith((".eh_proj.weight", ".enorm.weight"))}

    def _stacked(self, name: str) -> str | None:
        """Name in the files of an expert parameter that is stored stacked."""
        return self._stored.get(hf.published_name(name)) if hf.is_expert(name) else None


def _layer(name: str) -> str:
    """`model.layers.3.` of the names of its tensors, empty of others."""
    found = re.match(r"model\.layers\.\d+\.", name)
    return "" if found is None else found[0]


def check_finite(tensor: torch.Tensor, name: str, file: Path) -> None:
    """Refuse a weight that is NaN or infinite.

    Raises:
        UserError: it names the tensor and its file.
    """
    if not torch.isfinite(tensor.float() if tensor.dtype in _FLOAT8 else tensor).all():
        raise UserError(f"tensor {name} of {file} holds NaN or infinity: use another checkpoint")


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest

"""What a step does: operations, bytes, products by dtype, waits of the host, exchanges, and memory by part."""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# the CUDA allocator gives out multiples of this
_BLOCK_BYTES = 512
_ALLOCATES_ONLY = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default,
}  # fmt: skip
_COPIES = {aten._to_copy.default, aten.copy_.default}
_SIZES_DEPEND_ON_VALUES = {
    aten.nonzero.default, aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default,
    aten.bincount.default, aten.masked_select.default, aten.equal.default,
}  # fmt: skip


class Wait(NamedTuple):
    """One time that the host waits for the device. what: a name of `ops.host.read`, or the operation that waits."""

    phase: str
    what: str
    where: str


class Exchange(NamedTuple):
    """One collective call, as this rank makes it."""

    phase: str
    name: str
    ranks: tuple[int, ...]
    dtype: torch.dtype
    sent: tuple[int, ...]  # rows to each rank, where they differ; else the shape
    received: tuple[int, ...]
    elements: int


@dataclass
class Memory:
    """Bytes at the highest point, by part."""

    peak: int
    parts: dict[str, int]


class Recorder(TorchDispatchMode):
    """Sees all operations while it is entered (within `cuda_without_values`).

    Counters have a number for each phase, which the driver of the step sets. faults: what no CUDA run would survive, or
    no one wants there, in sentences.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "build"
        self.kind = "weights"
        self.operations: Counter[str] = Counter()
        self.names: dict[str, Counter[str]] = {}
        self.bytes: Counter[str] = Counter()
        self.product_flops: Counter[torch.dtype] = Counter()
        self.waits: list[Wait] = []
        self.uploads: list[Wait] = []
        self.exchanges: list[Exchange] = []
        self.faults: list[str] = []
        self.memory = Memory(0, {})
        self._held: dict[int, tuple[int, str]] = {}
        self._by_kind: Counter[str] = Counter()
        self._in_use = 0

    @contextlib.contextmanager
    def during(self, phase: str, kind: str) -> Iterator[None]:
        """Meanwhile operations are of one phase and memory is of one part."""
        before = self.phase, self.kind
        self.phase, self.kind = phase, kind
        yield
        self.phase, self.kind = before

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.device.type == "cuda" for t in tensors)
        if func is aten._local_scalar_dense.default:
            if on_device:
                self._wait("the value of a tensor (item, bool, int, float or tolist)")
            return _plausible(tensors[0].dtype)
        if on_device and func in _SIZES_DEPEND_ON_VALUES:
            return self._sized_by_values(func, args, kwargs)
        if on_device and func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self._wait("an index by a mask")
            args = (args[0], [_every_row(t) for t in args[1]])
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self.faults.append(f"{func} at {_where()}: {str(error).strip().splitlines()[0]}")
            raise
        self._record(func, tensors, out)
        if func in _COPIES:
            self._copied(func, args, kwargs, out)
        return out

    def _record(self, func: Any, tensors: list[Tensor], out: Any) -> None:
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if not any(t.device.type == "cuda" for t in (*tensors, *results)):
            return
        storages = {t.untyped_storage()._cdata for t in tensors}
        fresh = [t for t in results if t.untyped_storage()._cdata not in storages]
        for t in fresh:
            self._allocated(t)
            if t.dtype == torch.float64 and self.phase != "loop":  # a record's sums are
                self.faults.append(f"{func} at {_where()}: its result is fp64")
        writes = func._schema.is_mutable
        if func in _ALLOCATES_ONLY or not (fresh or writes):
            return
        self.operations[self.phase] += 1
        self.names.setdefault(self.phase, Counter())[str(func.overloadpacket)] += 1
        moved = {id(t): t.numel() * t.element_size() for t in (*tensors, *results)}
        self.bytes[self.phase] += sum(moved.values())
        if func.overloadpacket in flop_registry:
            self._product(func, tensors, out)

    def _product(self, func: Any, tensors: list[Tensor], out: Any) -> None:
        wide = max((t.dtype for t in tensors if t.is_floating_point()), key=lambda dtype: dtype.itemsize)
        matrices = [t for t in tensors if t.is_floating_point()]
        rows = matrices[0].numel() / max(matrices[0].shape[-1], 1)
        last = matrices[1].shape[-1] if len(matrices) > 1 else 1
        self.product_flops[wide] += int(2 * rows * matrices[0].shape[-1] * last)

    def _copied(self, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
        source = args[1] if func is aten.copy_.default else args[0]
        blocking = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
        if source.device.type == "cuda" and out.device.type == "cpu" and blocking:
            self._wait("a copy to the host")
        if source.device.type == "cpu" and out.device.type == "cuda":
            self.uploads.append(Wait(self.phase, f"{tuple(source.shape)} {source.dtype}", _where()))

    def _sized_by_values(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What waits for the device to learn the size of its result: recorded, and answered with the largest."""
        self._wait(str(func.overloadpacket))
        x = args[0]
        if func is aten.nonzero.default:
            return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)
        if func is aten.equal.default:
            return True
        if func is aten.masked_select.default:
            return x.new_empty(x.numel())
        if func is aten.bincount.default:
            return x.new_empty(max(kwargs.get("minlength", 0), 8), dtype=torch.int64)
        index = x.new_empty(x.numel(), dtype=torch.int64)
        return torch.empty_like(x), index, index

    def _wait(self, what: str) -> None:
        self.waits.append(Wait(self.phase, what, _where()))

    # memory

    def _allocated(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, nbytes = storage._cdata, -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        if t.device.type != "cuda" or key in self._held:
            return
        self._held[key] = nbytes, self.kind
        self._by_kind[self.kind] += nbytes
        self._in_use += nbytes
        weakref.finalize(storage, self._freed, key)
        if self._in_use > self.memory.peak:
            self.memory = Memory(self._in_use, dict(self._by_kind))

    def _freed(self, key: int) -> None:
        nbytes, kind = self._held.pop(key, (0, ""))
        self._by_kind[kind] -= nbytes
        self._in_use -= nbytes

    def relabel(self, t: Tensor, kind: str) -> None:
        """Count a tensor's memory as of another part."""
        key = t.untyped_storage()._cdata
        if key in self._held:
            nbytes, before = self._held[key]
            self._held[key] = nbytes, kind
            self._by_kind[before] -= nbytes
            self._by_kind[kind] += nbytes

    def start_measuring(self) -> None:
        """The highest point from now on."""
        self.memory = Memory(self._in_use, dict(self._by_kind))

    # the host and the other ranks

    def read(self, values: "Values", tensor: Tensor, what: str, total: int | None) -> np.ndarray:
        """For `ops.host.reading_with`."""
        if tensor.device.type == "cuda":
            self._wait(what)
        return values(tensor, what, total)

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """Meanwhile calls of torch.distributed are recorded."""
        with contextlib.ExitStack() as stack:
            for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor"):
                stack.enter_context(mock.patch.object(dist, name, self._recorded(name, getattr(dist, name))))
            yield

    def _recorded(self, name: str, call: Any) -> Any:
        def recorded(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            splits = [a for a in args if isinstance(a, list)]
            given = args[0] if args and isinstance(args[0], Tensor) else output
            group = kwargs.get("group")
            ranks = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
            for t in (output, given):
                if t.device.type != "cuda":
                    self.faults.append(f"{name} at {_where()}: NCCL takes no tensor on the {t.device.type}")
            received, sent = splits if splits else (output.shape, given.shape)
            self.exchanges.append(
                Exchange(self.phase, name, ranks, output.dtype, tuple(sent), tuple(received), given.numel())
            )
            return call(output, *args, **kwargs)

        return recorded


class Values:
    """What the host reads where nothing has a value: loads that add up, over ranks too.

    Args:
        tokens: rows that the tokens of a micro-batch make where their number is theirs to choose.
        skew: of each pair of experts, what share of its rows the second one gives to the first; ranks take turns in
            which is the first. 0: all loads are even.
    """

    def __init__(self, rank: int, ranks: int, tokens: int, skew: float = 0.0):
        self.rank, self.ranks, self.tokens, self.skew = rank, ranks, tokens, skew

    def __call__(self, tensor: Tensor, what: str, total: int | None) -> np.ndarray:
        if what == "rows that each rank sends and receives":
            assert total is not None
            _, ranks, held = tensor.shape
            first = self.rank // ranks * ranks
            sent = [self._loads(first + source, ranks * held, total).reshape(ranks, held) for source in range(ranks)]
            mine = self.rank - first
            return np.stack([sent[mine], np.stack([loads[mine] for loads in sent])])
        if what == "rows of all tokens":
            assert total is not None
            return np.array(min(total, self.tokens))
        if total is not None:
            return self._loads(self.rank, tensor.numel(), total).reshape(tuple(tensor.shape))
        return np.full(tuple(tensor.shape), _plausible(tensor.dtype))

    def _loads(self, rank: int, experts: int, total: int) -> np.ndarray:
        loads = np.full(experts, total // experts, np.int64)
        loads[: total % experts] += 1
        for pair in range(experts // 2):
            first, second = (2 * pair, 2 * pair + 1)[:: 1 if rank % 2 else -1]
            moved = int(loads[second] * self.skew)
            loads[first] += moved
            loads[second] -= moved
        return loads


def _plausible(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _every_row(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool:
        return index
    assert index.dim() == 1, "masks of several dimensions are not rehearsed"
    return torch.zeros_like(index, dtype=torch.int64)


def _where() -> str:
    """The innermost line of this package's own code, as file:line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("moe_llm.") and ".rehearsal" not in name and name != "moe_llm.ops.host":
            return f"{name.removeprefix('moe_llm.').replace('.', '/')}.py:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"

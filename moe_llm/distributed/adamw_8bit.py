"""AdamW whose two moments are held in 8 bits an element, on whole parameters or on ZeRO's slices of them.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization": blocks of 256 elements, each with its absolute maximum,
and a map of 256 values that are denser near zero. bitsandbytes packs, unpacks and updates. Blocks are counted from the first
element of a parameter, however ZeRO cuts it: only a block through which a cut goes is packed in two parts, each by itself.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_llm.distributed.muon import Share, whole

BLOCK = 256
# elements of a matrix below which its moments stay in fp32, as in bitsandbytes
SMALLEST = 4096
_CHUNK = 2**22  # elements that are updated at once: on the CPU they are unpacked together


class Run(NamedTuple):
    """Elements of a flat slice that are updated together: from `start`, so many. packed: whether their moments are."""

    start: int
    length: int
    packed: bool


class Moment:
    """One moment of a run of elements: codes and a maximum for each block, or fp32."""

    def __init__(self, run: Run, signed: bool, device: torch.device):
        self.signed, self.packed = signed, run.packed
        kind = torch.uint8 if run.packed else torch.float32
        self.values = torch.zeros(run.length, dtype=kind, device=device)
        blocks = -(-run.length // BLOCK) if run.packed else 0
        self.absmax = torch.zeros(blocks, device=device)

    @property
    def map(self) -> Tensor:
        """The values that a block's codes stand for, over its maximum."""
        return _map(self.signed, self.values.device)

    def read(self) -> Tensor:
        """fp32, (length,)."""
        if not self.packed:
            return self.values
        unpack = torch.ops.bitsandbytes.dequantize_blockwise
        values: Tensor = unpack(self.values, self.absmax, self.map, BLOCK, torch.float32)
        return values

    def write(self, values: Tensor) -> None:
        """Set it from fp32, (length,): what `read` has given is kept to the bit. (bitsandbytes' own packing is not exact
        near zero on the CPU.)"""
        if self.packed:
            blocks = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
            self.absmax.copy_(blocks.abs().amax(1))
            shares = (blocks / self.absmax.clamp(min=torch.finfo().tiny)[:, None]).flatten()[: values.numel()]
            values = torch.bucketize(shares, (self.map[1:] + self.map[:-1]) / 2)
        self.values.copy_(values)


_MAPS: dict[tuple[bool, torch.device], Tensor] = {}


def _map(signed: bool, device: torch.device) -> Tensor:
    if (signed, device) not in _MAPS:
        from bitsandbytes.functional import create_dynamic_map

        values = create_dynamic_map(signed=signed)
        if signed:
            # theirs ends at -0.993: a block whose largest value is negative would become smaller each time it is packed
            values[0] = -1.0
        _MAPS[signed, device] = values.to(device)
    return _MAPS[signed, device]


class AdamW8bit(torch.optim.Optimizer):
    """Updates are those of AdamW (Loshchilov and Hutter 2019) from unpacked moments; weights and gradients are fp32. The
    moments of groups whose `packed` is false, and of matrices with fewer than `SMALLEST` elements, are in fp32.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        # it warns of a kernel for 4-bit products that is not used here
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        import bitsandbytes  # noqa: F401  (registers its operations)

        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.share_of: Callable[[Tensor], Share] = whole

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the training loop computes gradients itself"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def begin(self, weight: Tensor, group: dict, steps: int) -> None:
        """Give a weight of a group the state that it has after so many updates, with moments of zero."""
        runs = list(_runs(self.share_of(weight), group.get("packed", True)))
        self.state[weight].update(step=steps, runs=runs)
        for kind, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            self.state[weight][kind] = [Moment(run, signed, weight.device) for run in runs]

    def _update(self, weight: Tensor, group: dict) -> None:
        from bitsandbytes import functional as bnb

        state = self.state[weight]
        if "step" not in state:
            self.begin(weight, group, 0)
        state["step"] += 1
        (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
        weights, gradients = weight.view(-1), weight.grad.reshape(-1)  # type: ignore[union-attr]
        for run, first, second in zip(state["runs"], state["exp_avg"], state["exp_avg_sq"], strict=True):
            w, g = (t[run.start : run.start + run.length] for t in (weights, gradients))
            if run.packed:
                bnb.optimizer_update_8bit_blockwise(
                    "adam", g, w, first.values, second.values, beta1, beta2, 0.0, 0.0, eps, state["step"], group["lr"],
                    first.map, second.map, first.absmax, second.absmax, decay,
                )  # fmt: skip
            else:
                bnb.optimizer_update_32bit(
                    "adam", g, w, first.values, beta1, eps, state["step"], group["lr"], second.values, beta2,
                    weight_decay=decay,
                )  # fmt: skip

    def read(self, weight: Tensor, kind: str, start: int, length: int) -> Tensor:
        """A moment of the elements of one parameter in a slice: fp32, (length,)."""
        values = [moment.read() for moment, _ in self._moments(weight, kind, start, length)]
        return torch.cat(values) if values else weight.new_zeros(0, dtype=torch.float32)

    def write(self, weight: Tensor, kind: str, start: int, flat: Tensor) -> None:
        """Set what `read` gives."""
        for moment, run in self._moments(weight, kind, start, flat.numel()):
            begin = run.start - start
            moment.write(flat[begin : begin + run.length].float())

    def _moments(self, weight: Tensor, kind: str, start: int, length: int) -> Iterator[tuple[Moment, Run]]:
        state, found = self.state[weight], 0
        for run, moment in zip(state["runs"], state[kind], strict=True):
            if start <= run.start < start + length:
                found += run.length
                yield moment, run
        assert found == length, "what is read or written is all that a slice has of a parameter"


def _runs(share: Share, packs: bool) -> Iterator[Run]:
    """The runs of a slice: of each parameter the part of a block with which it may begin, and whole blocks."""
    for piece in share.pieces:
        packed = packs and torch.Size(piece.shape[-2:]).numel() >= SMALLEST
        cuts = [0, *range(-piece.first % BLOCK or _CHUNK, piece.length, _CHUNK), piece.length]
        for begin, end in pairwise(cuts):
            if begin < end:
                yield Run(piece.start + begin, end - begin, packed)

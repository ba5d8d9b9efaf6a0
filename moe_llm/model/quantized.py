"""Experts whose weights are held in 8 or 4 bits and are made whole while a layer computes: for inference, and as the frozen
base of adapters (QLoRA, Dettmers et al. 2023; QMoE, Frantar and Alistarh 2023, on why experts above all).

bitsandbytes packs and unpacks: 8 bits by its dynamic map, 4 bits as NF4, with an absolute maximum for each block of 64
elements. Experts are packed one by one, so that those of a rank are what one process would have. Arithmetic is that of
the unpacked weights: nothing is rounded besides.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["int8", "nf4"]
BLOCK = 64
_EXPERTS = re.compile(r"\.experts(\.|$)")


class Packed:
    """A weight in few bits, of the shape that it was packed from; the first of three dimensions counts experts.

    It answers to what an engine asks of a parameter that is not trained: `shape`, `detach` and `float`, which unpack, and `copy_`,
    which packs anew.
    """

    requires_grad = False

    def __init__(self, weight: Tensor, kind: Kind):
        self.kind, self.shape, self.dtype = kind, weight.shape, weight.dtype
        self.copy_(weight)

    @property
    def data(self) -> "Packed":
        return self

    @property
    def device(self) -> torch.device:
        device: torch.device = self._parts[0][0].device
        return device

    @property
    def nbytes(self) -> int:
        return sum(codes.nbytes + state.absmax.nbytes for codes, state in self._parts)

    def numel(self) -> int:
        return math.prod(self.shape)

    @torch.no_grad()
    def copy_(self, weight: Tensor) -> "Packed":
        """Pack other values, of the same shape."""
        import bitsandbytes.functional as bnb

        assert weight.shape == self.shape, (weight.shape, self.shape)
        device = self.device if hasattr(self, "_parts") else weight.device
        whole = weight.detach().to(device=device, dtype=self.dtype)
        self._parts: list[tuple[Tensor, Any]] = []
        for part in whole if whole.dim() == 3 else [whole]:
            if self.kind == "nf4":
                self._parts.append(bnb.quantize_4bit(part.contiguous(), blocksize=BLOCK, quant_type="nf4"))
            else:
                self._parts.append(bnb.quantize_blockwise(part.contiguous(), blocksize=BLOCK))
        return self

    @torch.no_grad()
    def detach(self) -> Tensor:
        """The whole weight, as near as its bits come to it."""
        import bitsandbytes.functional as bnb

        unpack = bnb.dequantize_4bit if self.kind == "nf4" else bnb.dequantize_blockwise
        parts = [unpack(codes, state).to(self.dtype) for codes, state in self._parts]
        return torch.stack(parts) if len(self.shape) == 3 else parts[0]

    def float(self) -> Tensor:
        """The same in fp32."""
        return self.detach().float()

    def apply(self, move: Callable[[Tensor], Tensor]) -> None:
        """A module's move or cast: codes move, and unpack to the dtype of the cast."""
        self.dtype = move(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        device = move(torch.empty(0, device=self.device)).device
        for i, (codes, state) in enumerate(self._parts):
            state.to(device)
            self._parts[i] = codes.to(device), state


class _Quantized(nn.Module):
    """What a module becomes of which some weights are packed: they are there while it computes, and the backward pass
    unpacks them again in place of keeping them."""

    packed: dict[str, Packed]
    _whole: dict[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._whole = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, self._bring):
                return super().__call__(*args, **kwargs)
        finally:
            self._whole = {}

    def unpacked(self, name: str) -> Tensor:
        if not hasattr(self, "_whole") or name not in self._whole:
            whole = self.packed[name].detach()
            self.__dict__.setdefault("_whole", {})[name] = whole
        return self._whole[name]

    def _keep(self, tensor: Tensor) -> Any:
        pointer = tensor.untyped_storage().data_ptr()
        for name, whole in self._whole.items():
            if pointer and whole.untyped_storage().data_ptr() == pointer:
                return name, tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor

    def _bring(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        name, size, stride, offset = kept
        return self.packed[name].detach().as_strided(size, stride, offset)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Quantized":
        super()._apply(fn, recurse)
        for packed in self.packed.values():
            packed.apply(fn)
        return self


def quantize_experts(model: nn.Module, kind: Kind) -> dict[str, float]:
    """Hold the matrices of all routed experts, ours or transformers', in few bits; none of them may be trained.

    Returns:
        expert_bytes, before and after as `expert_bytes_before`, and expert_weight_error, the norm of what is lost over that
        of the weights.
    """
    before = after = 0
    lost = square = 0.0
    for name, module in model.named_modules():
        if not _EXPERTS.search(name):
            continue
        names = [leaf for leaf, p in module.named_parameters(recurse=False) if p.dim() >= 2 and "_lora_" not in leaf]
        matrices = {leaf: getattr(module, leaf) for leaf in names if not leaf.endswith("bias")}
        for leaf, parameter in matrices.items():
            assert not parameter.requires_grad or not torch.is_grad_enabled(), f"{name}.{leaf} is to be trained"
            packed = Packed(parameter, kind)
            if not parameter.is_meta:
                whole = parameter.detach().double()
                lost += float((packed.detach().double() - whole).square().sum())
                square += float(whole.square().sum())
            before, after = before + parameter.nbytes, after + packed.nbytes
            _replace(module, leaf, packed)
    return {
        "expert_bytes": after,
        "expert_bytes_before": before,
        "expert_weight_error": math.sqrt(lost / square) if square else 0.0,
    }


def _replace(module: nn.Module, leaf: str, packed: Packed) -> None:
    """Take a parameter away and let the module find its packed form under the same name."""
    del module._parameters[leaf]
    if not isinstance(module, _Quantized):
        module.__class__ = type(f"Quantized{type(module).__name__}", (_Quantized, type(module)), {})
        module.__dict__["packed"] = {}
    kind: Any = type(module)
    setattr(kind, leaf, property(lambda self: self.unpacked(leaf)))
    module.__dict__["packed"][leaf] = packed


def packed_weights(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Of all modules, by the names that they had as parameters."""
    for name, module in model.named_modules():
        if isinstance(module, _Quantized):
            yield from ((f"{name}.{leaf}", packed) for leaf, packed in module.packed.items())

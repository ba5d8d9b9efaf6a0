"""What layers keep for their backward pass, in host memory until it is needed (`train.activation_offload`).

On CUDA copies travel on a stream of their own, and when the backward pass comes to a layer the one before it is fetched, so
that computation and copies overlap (as in Ren et al. 2021, "ZeRO-Offload", for the optimizer's tensors). The device then
holds about two layers' activations in place of all.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 2**16  # bytes: smaller tensors are not worth a copy from a GPU


class _Held:
    """A tensor in host memory. uses: how often it will be asked for."""

    def __init__(self, value: Tensor, offload: "Offload", layer: int):
        self.offload, self.layer, self.device, self.uses = offload, layer, value.device, 0
        self.host = torch.empty_like(value, device="cpu", pin_memory=offload.stream is not None)
        with offload.copying():
            self.host.copy_(value, non_blocking=True)
        if offload.stream is not None:
            value.record_stream(offload.stream)  # its memory is not handed out before it has been copied
        self.fetched: Tensor | None = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.fetched is None:
            with self.offload.copying():
                self.fetched = torch.empty_like(self.host, device=self.device)
                self.fetched.copy_(self.host, non_blocking=True)

    def take(self) -> Tensor:
        """On its device, with the layer before it on its way."""
        self.fetch()
        value = self.fetched
        assert value is not None
        self.uses -= 1
        if self.uses <= 0:
            self.fetched = None
        if self.offload.stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self.offload.stream)
            value.record_stream(current)
        self.offload.fetch_before(self.layer)
        return value


class Offload:
    """Of one forward pass. Parameters, small tensors and `shared` ones, which every layer has, stay where they are.

    Args:
        shared: tensors that all layers are given.
    """

    def __init__(self, device: torch.device, shared: list[Tensor]):
        self.stream = _stream(device) if device.type == "cuda" and torch.cuda.is_available() else None
        self._smallest = (
            _SMALLEST if device.type == "cuda" else 0
        )  # between host and host every copy shows that it works
        self._device, self._shared = device.type, {t.untyped_storage()._cdata for t in shared}
        self._layers: list[list[_Held]] = []
        # several operations keep the same tensor: of the layer under way, tensors and what stands for them
        self._known: dict[tuple, tuple[Tensor, _Held]] = {}

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """Meanwhile one layer's forward pass is under way."""
        self._layers.append([])
        with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack):
            yield
        self._known.clear()

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Meanwhile what is started waits for what has been computed so far, and nothing computed waits for it."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def pack(self, value: Tensor) -> "Tensor | _Held":
        """What stands for a tensor that is kept."""
        if not self._leaves(value):
            return value
        key = value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value._version
        if key not in self._known:
            held = _Held(value.detach(), self, len(self._layers) - 1)
            self._layers[-1].append(held)
            self._known[key] = value.detach(), held
        held = self._known[key][1]
        held.uses += 1
        return held

    def fetch_before(self, layer: int) -> None:
        """Begin to bring back what the layer before this one has kept, and forget this one."""
        self._layers[layer].clear()
        for held in self._layers[layer - 1] if layer else ():
            held.fetch()

    def _leaves(self, value: Tensor) -> bool:
        owner = value._base if value._base is not None else value
        return (
            value.device.type == self._device
            and value.layout is torch.strided
            and value.numel() * value.element_size() >= self._smallest
            and not isinstance(owner, nn.Parameter)
            and value.untyped_storage()._cdata not in self._shared
        )


def unpack(kept: Any) -> Any:
    """The tensor that `Offload.pack` was given."""
    return kept.take() if isinstance(kept, _Held) else kept


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: the allocator keeps memory apart by stream."""
    return _streams.setdefault(device, torch.cuda.Stream(device))

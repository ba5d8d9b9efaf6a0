"""The one door through which training code reads values of a device on the host.

Such a read waits for everything that the device has still to do, so each one has a name and a reason. A rehearsal without
a device (`moe_llm.distributed.rehearsal`) takes the door's place: it counts who comes through, and gives balanced values.
What waits without using the door is a fault, which the rehearsal finds.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

Reader = Callable[[Tensor, str, int | None], np.ndarray]


def read(tensor: Tensor, what: str, total: int | None = None) -> np.ndarray:
    """The values of a tensor, in its shape, once the device has computed them.

    Args:
        what: names the read in reports, such as "rows that each rank sends and receives".
        total: what the values along the last dimensions sum to, or at most sum to, as far as the host knows it.
    """
    return _reader(tensor, what, total)


@contextlib.contextmanager
def reading_with(reader: Reader) -> Iterator[None]:
    """Meanwhile `reader` answers all reads."""
    global _reader
    before, _reader = _reader, reader
    try:
        yield
    finally:
        _reader = before


def _read(tensor: Tensor, what: str, total: int | None) -> np.ndarray:
    return tensor.detach().cpu().numpy()


_reader: Reader = _read

"""Initial weights, by what every decoder has in common: normal matrices of deviation `initializer_range`, those that write
into the residual stream divided by the root of twice the layers (Radford et al. 2019, section 2.3), norms of one and biases
of zero; and no two matrices are equal. What a router makes of its own parameters is left to it."""

import math
import re
from collections.abc import Mapping

import numpy as np

_WRITES = re.compile(r".*(o_proj\.weight|down_proj(\.weight)?)")
_SURE = 6.0  # standard errors, which chance does not exceed


def wrong_weights(weights: Mapping[str, np.ndarray], deviation: float, layers: int) -> list[str]:
    """What departs, in order.

    Args:
        weights: whole tensors by name; of stacked experts, one matrix for each.
        deviation: `initializer_range`.
        layers: blocks of the model.
    """
    wrong: list[str] = []
    seen: dict[bytes, str] = {}
    for name, value in weights.items():
        if ".mlp.gate." in name or "lora_" in name:
            continue
        if name.endswith(("norm.weight", ".bias", "_bias", ".sinks")):
            due = 1.0 if name.endswith("norm.weight") else 0.0
            wrong += [] if (value == due).all() else [f"{name}: is not {due:g} everywhere"]
            continue
        own = deviation / math.sqrt(2 * layers) if _WRITES.fullmatch(name) else deviation
        found, error = float(value.std()), own / math.sqrt(2 * value.size)
        if abs(found - own) > _SURE * error:
            wrong.append(f"{name}: deviates by {found:.3g}, and initializer_range={deviation:g} asks for {own:.3g}")
        if abs(float(value.mean())) > _SURE * own / math.sqrt(value.size):
            wrong.append(f"{name}: has a mean of {value.mean():.2g}")
        for number, matrix in enumerate(value if value.ndim == 3 else value[None]):
            place = f"{name}, expert {number}" if value.ndim == 3 else name
            other = seen.setdefault(matrix.tobytes(), place)
            if other != place:
                wrong.append(f"{place}: begins with the weights of {other}")
    return wrong

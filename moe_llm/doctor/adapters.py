"""Low-rank adapters as transformers sees them: merged weights, from whose gradients the factors' follow."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from moe_llm.checkpoint.plan import low_rank_sum
from moe_llm.config import Config
from moe_llm.doctor.compare import Whole
from moe_llm.doctor.oracle.transformer import Expected
from moe_llm.model.adapters import factors_of, is_factor


def merged(weights: Whole, config: Config) -> Whole:
    """Whole tensors as they are exported; the same where there are no adapters."""
    whole = {name: value for name, value in weights.items() if not is_factor(name)}
    for name, a, b in _adapted(weights):
        change = low_rank_sum(torch.from_numpy(weights[a]), torch.from_numpy(weights[b]), config.finetune.lora.scale)
        whole[name] = whole[name] + change.numpy()
    return whole


def with_factors(expected: Expected, weights: Whole, config: Config) -> Expected:
    """With the gradients of the factors, where there are any: W + s B A has dB = s dW A^T and dA = s B^T dW."""
    slopes = dict(expected.gradients)
    for name, a, b in _adapted(weights):
        slope = config.finetune.lora.scale * expected.gradients[name]
        slopes |= {a: _transposed(weights[b]) @ slope, b: slope @ _transposed(weights[a])}
    return replace(expected, gradients=slopes)


def _adapted(weights: Whole) -> Iterator[tuple[str, str, str]]:
    """Name of each weight that has factors, and theirs."""
    for name in weights:
        a, b = factors_of(name)
        if a in weights:
            yield name, a, b


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)

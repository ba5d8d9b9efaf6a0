"""Low-rank adapters as transformers sees them: merged weights, from whose gradients the factors' follow."""

from collections.abc import Iterator
from dataclasses import replace

from moe_llm.config import Config
from moe_llm.doctor.compare import Whole
from moe_llm.doctor.oracle import low_rank
from moe_llm.doctor.oracle.transformer import Expected
from moe_llm.model.adapters import factors_of, is_factor


def merged(weights: Whole, config: Config) -> Whole:
    """Whole tensors as they are exported; the same where there are no adapters."""
    whole = {name: value for name, value in weights.items() if not is_factor(name)}
    for name, a, b in _adapted(weights):
        whole[name] = low_rank.merged(whole[name], weights[a], weights[b], config.finetune.lora.scale)
    return whole


def with_factors(expected: Expected, weights: Whole, config: Config) -> Expected:
    """With the gradients of the factors, where there are any."""
    slopes = dict(expected.gradients)
    for name, a, b in _adapted(weights):
        slopes[a], slopes[b] = low_rank.factor_gradients(
            expected.gradients[name], weights[a], weights[b], config.finetune.lora.scale
        )
    return replace(expected, gradients=slopes)


def adapted(weights: Whole) -> set[str]:
    """Names of the weights that have factors."""
    return {name for name, _, _ in _adapted(weights)}


def _adapted(weights: Whole) -> Iterator[tuple[str, str, str]]:
    """Name of each weight that has factors, and theirs."""
    for name in weights:
        a, b = factors_of(name)
        if a in weights:
            yield name, a, b

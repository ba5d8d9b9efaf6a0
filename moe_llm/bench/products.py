"""A training step's bare matrix products, timed alone at their own shapes: the limit that the step is held against.

Dimensions: B batch, S sequence, T tokens (B * S), D hidden, F expert width, E experts, L layers, V vocabulary,
H query heads, G key-value heads, d head dimension, R rows, I input and O output features of a product.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_llm.config import ModelConfig
from moe_llm.ops.products import bmm, mm


class ProductShape(NamedTuple):
    """A linear map of `rows` rows: one product forward, two backward, `times` times. weights: different matrices
    that successive products take turns with, as experts do."""

    part: str
    rows: int
    inputs: int
    outputs: int
    times: int = 1


class Scores(NamedTuple):
    """Attention's products for `heads` (over the batch) of `length` positions: two forward, four backward, over the
    causal half, counted as half as many keys."""

    part: str
    heads: int
    length: int
    head_dim: int
    times: int = 1


class PartLimit(NamedTuple):
    """flops of a part's products in one step, and the seconds that they take alone."""

    flops: float
    seconds: float


def step_products(
    config: ModelConfig,
    batch: int,
    length: int,
    counts_LE: list[list[int]],
    num_targets: int | None = None,
    visible: int | None = None,
) -> list[ProductShape | Scores]:
    """The products of forward and backward for `batch` sequences.

    Args:
        counts_LE: rows of each expert in each layer.
        num_targets: rows of the loss; None: all.
        visible: the length of sequences as blind to each other as documents are; None: the whole length.
    """
    T, D, d, L = batch * length, config.hidden_size, config.attention_head_dim, config.num_hidden_layers
    heads, kv = config.num_attention_heads, config.kv_heads
    W, sizes = config.expert_hidden_size, config.expert_sizes or [config.intermediate_size] * config.num_local_experts
    products: list[ProductShape | Scores] = [
        ProductShape("attention", T, D, heads * d, L),
        ProductShape("attention", T, D, kv * d, 2 * L),
        ProductShape("attention", T, heads * d, D, L),
        Scores("attention", round(batch * heads * length / (visible or length)), visible or length, d, L),
        ProductShape("router", T, D, config.num_local_experts, L),
        ProductShape("loss", T if num_targets is None else num_targets, D, config.resolved_vocab_size),
    ]
    for counts_E in counts_LE:
        for rows, F in zip(counts_E, sizes, strict=True):
            products += [ProductShape("experts", rows, W, 2 * F), ProductShape("experts", rows, F, W)] if rows else []
    return products


def flops(product: ProductShape | Scores) -> float:
    """Floating-point operations, forward and backward."""
    if isinstance(product, ProductShape):
        return 6.0 * product.times * product.rows * product.inputs * product.outputs
    return 6.0 * product.times * product.heads * product.length * product.length * product.head_dim


def prepare_products(
    products: Iterable[ProductShape | Scores], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[float, Callable[[], None]]]:
    """Of each part, the flops of its products and what computes them, with operands and results in memory that exists
    already. The router's products are in fp32."""
    parts: dict[str, list] = {}
    for product in products:
        parts.setdefault(product.part, []).append(product)
    prepared: dict[str, tuple[float, Callable[[], None]]] = {}
    for part, members in parts.items():
        kind = torch.float32 if part == "router" else dtype
        distinct = {product: _prepare(product, kind, device) for product in dict.fromkeys(members)}

        def run(runs: tuple[Callable[[], None], ...] = tuple(distinct[product] for product in members)) -> None:
            for one in runs:
                one()

        prepared[part] = sum(map(flops, members)), run
    return prepared


def measure_products(
    products: Iterable[ProductShape | Scores], dtype: torch.dtype, device: torch.device, rounds: int = 3
) -> dict[str, PartLimit]:
    """Seconds of each part's products, by themselves: the median of `rounds` after one that compiles what kernels
    compile."""
    return {
        part: PartLimit(count, _median_seconds(run, device, rounds))
        for part, (count, run) in prepare_products(products, dtype, device).items()
    }


def peak_rate(dtype: torch.dtype, device: torch.device, size: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of a plain square product."""
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2.0 * size**3 / _median_seconds(lambda: mm(a, b, out=out), device, rounds)


def _prepare(product: ProductShape | Scores, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if isinstance(product, ProductShape):
        _, R, I, O, times = product
        x_RI, w_OI, y_RO = normal(R, I), normal(O, I), normal(R, O)
        dx_RI, dw_OI = torch.empty_like(x_RI), torch.empty_like(w_OI)

        def run() -> None:
            for _ in range(times):
                mm(x_RI, w_OI.t(), out=y_RO)
                mm(y_RO, w_OI, out=dx_RI)
                mm(y_RO.t(), x_RI, out=dw_OI)

        return run

    _, N, S, d, times = product
    keys = max(1, S // 2)
    q_NSd, k_NKd, p_NSK = normal(N, S, d), normal(N, keys, d), normal(N, S, keys)
    out_NSd, out_NKd = torch.empty_like(q_NSd), torch.empty_like(k_NKd)

    def run_scores() -> None:
        for _ in range(times):
            bmm(q_NSd, k_NKd.transpose(1, 2), out=p_NSK)  # scores
            bmm(p_NSK, k_NKd, out=out_NSd)  # their product with the values
            bmm(p_NSK.transpose(1, 2), q_NSd, out=out_NKd)  # gradient of the values
            bmm(q_NSd, k_NKd.transpose(1, 2), out=p_NSK)  # of the probabilities
            bmm(p_NSK, k_NKd, out=out_NSd)  # of the queries
            bmm(p_NSK.transpose(1, 2), q_NSd, out=out_NKd)  # of the keys

    return run_scores


def _median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait for what was launched; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

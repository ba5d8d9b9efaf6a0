"""Which expert of one model is which of another, layer by layer.

The order of a layer's experts means nothing, so models without a common ancestor have theirs in different orders,
and averaging expert 3 with expert 3 mixes strangers. The reference's experts are matched one to one with the other
model's so that the sum of similarities is largest (linear assignment), and router rows, gate, up and down move
together: the function of the other model is unchanged. So with the neurons of an expert: rows of gate and up and
columns of down (as Ainsworth et al. 2023 for dense networks).

A layer in which the order as it is scores within MARGIN an expert of the best stays as it is: fine-tunes of one base
have their experts in one order, and where experts are nearly alike, noise must not reorder them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from moe_llm.errors import UserError
from moe_llm.families.architectures import FAMILIES
from moe_llm.merge.job import SPAN, Reader
from moe_llm.merge.models import MIXTURE, Model, layer_tensor
from moe_llm.merge.rows import Move, Moved

GATE_UP, DOWN, ROUTER = MIXTURE
MARGIN = 1e-3  # of similarity, which is at most 2: the experts' cosine plus the router rows'
_PROBES = 256

# what follows the experts' order: stacked matrices and vectors with an element or a row for each
_MOVED = (
    *MIXTURE,
    "mlp.gate.bias",
    "mlp.gate.e_score_correction_bias",
    "mlp.experts.gate_up_proj_bias",
    "mlp.experts.down_proj_bias",
)


class Match(NamedTuple):
    """One layer of `reference` and one of `other`: similarity_EE of its expert (row) and the other's, and for each of the
    reference's experts the other's that is matched with it, order_E."""

    reference: str
    layer: int
    other: str
    other_layer: int
    similarity_EE: torch.Tensor
    order_E: torch.Tensor

    @property
    def moved(self) -> int:
        """How many experts change places."""
        return int((self.order_E != torch.arange(len(self.order_E))).sum())


class Aligner:
    """Matches experts for one recipe; readers are matched when they are first read from.

    matches: in the order in which they were made.
    """

    def __init__(self, by: str, neurons: bool, text: list[str] | None = None, tokens: int = 2048):
        self.by, self.neurons, self.text, self.tokens = by, neurons, text, tokens
        self.matches: list[Match] = []
        self._inputs: dict[str, dict[int, torch.Tensor]] = {}

    def reader(self, reference: Model, layer: int, other: Model, other_layer: int) -> Reader:
        """`other`, with the experts of its layer in the reference's order."""
        if reference.config is None:
            raise UserError(
                f"align_experts={self.by!r} needs mixtures, and {reference.reference} is dense: set align_experts: none"
            )
        parts = [suffix for suffix in reference.layer_shapes(layer) if suffix.startswith(("mlp.gate.", "mlp.experts."))]
        if others := [suffix for suffix in parts if suffix not in _MOVED]:
            raise UserError(
                f"align_experts={self.by!r} moves experts, rows of {ROUTER} and biases alone, and {reference.reference} has "
                f"{others[0]}: set align_experts: none"
            )
        return _Aligned(other, partial(self._match, reference, layer, other, other_layer))

    def report(self) -> list[str]:
        """One sentence a model."""
        totals: dict[str, list[int]] = {}
        for match in self.matches:
            totals.setdefault(match.other, []).append(match.moved)
        return [
            f"{other}: experts already in order in all {len(counts)} layers" if not any(counts) else
            f"{other}: {sum(counts)} experts moved, in {sum(map(bool, counts))} of {len(counts)} layers"
            for other, counts in totals.items()
        ]  # fmt: skip

    def _match(self, reference: Model, layer: int, other: Model, other_layer: int) -> dict[str, Move]:
        a, b = _Layer(reference, layer), _Layer(other, other_layer)
        assert a.shapes == b.shapes, "the plan lets no such models through"
        similarity = self._similarity(a, b, reference, other)
        if not similarity.isfinite().all():
            raise UserError(
                f"the experts of layer {layer} of {reference.reference} and layer {other_layer} of {other.reference} "
                "cannot be compared, for some numbers are not finite: give sound checkpoints, or align_experts: none"
            )
        order = best_order(similarity, MARGIN)
        neurons = torch.arange(a.F).expand(a.E, a.F)
        if self.neurons:
            neurons = torch.stack([match_neurons(a.expert(e), b.expert(int(order[e]))) for e in range(a.E)])
        self.matches.append(Match(reference.reference, layer, other.reference, other_layer, similarity, order))
        return moves(b, order, neurons)

    def _similarity(self, a: "_Layer", b: "_Layer", reference: Model, other: Model) -> torch.Tensor:
        router = _cosines(a.router() @ b.router().T, a.router().square().sum(1), b.router().square().sum(1))
        if self.by == "activations":
            return function_similarity(a, b, self._layer_input(reference, a), self._layer_input(other, b)) + router
        if self.neurons:
            # the order of neurons spoils the weights' inner product; as a function an expert does not depend on it
            D = a.shapes[DOWN][1]
            x_TD = torch.randn(_PROBES, D, generator=torch.Generator().manual_seed(0))
            return function_similarity(a, b, x_TD, x_TD) + router
        return weight_similarity(a, b) + router

    def _layer_input(self, model: Model, layer: "_Layer") -> torch.Tensor:
        if model.reference not in self._inputs:
            from moe_llm.merge.activations import layer_inputs

            assert self.text is not None, "the recipe refuses activations without align_text"
            self._inputs[model.reference] = layer_inputs(model, self.text, self.tokens)
        return self._inputs[model.reference][layer.index]


class _Aligned:
    """A reader whose moves are found when they are first needed."""

    def __init__(self, model: Model, match: Callable[[], dict[str, Move]]):
        self._model, self._match = model, match
        self._moved: Moved | None = None
        self.shapes = model.shapes

    def dtype(self, name: str) -> torch.dtype:
        return self._model.dtype(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if ".mlp.experts." not in name and ".mlp.gate." not in name:
            return self._model.read(name, start, stop)
        if self._moved is None:
            self._moved = Moved(self._model, self._match())
        return self._moved.read(name, start, stop)


class _Layer:
    """The experts and the router of one layer of a model: E experts of width F on D."""

    def __init__(self, model: Model, index: int):
        self.model, self.index = model, index
        self.shapes = {suffix: list(model.shapes[layer_tensor(index, suffix)]) for suffix in MIXTURE}
        self.stacked = FAMILIES[model.kind].stacked
        self.E, self.D, self.F = self.shapes[DOWN]
        if self.stacked:
            self.D, self.F = self.F, self.D

    def name(self, suffix: str) -> str:
        return layer_tensor(self.index, suffix)

    def router(self) -> torch.Tensor:
        """(E, D), fp32."""
        return self.model.read(self.name(ROUTER), 0, self.E * self.D).float().view(self.E, self.D)

    def expert(self, e: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate (F, D), up (F, D) and down (D, F) of an expert, fp32."""
        size = self.F * self.D
        gate_up = self.model.read(self.name(GATE_UP), 2 * e * size, 2 * (e + 1) * size).float()
        down = self.model.read(self.name(DOWN), e * size, (e + 1) * size).float()
        if self.stacked:
            gate, up = gate_up.view(self.D, self.F, 2).permute(2, 1, 0)
            return gate, up, down.view(self.F, self.D).T
        gate, up = gate_up.view(2, self.F, self.D)
        return gate, up, down.view(self.D, self.F)

    def output(self, e: int, x_TD: torch.Tensor) -> torch.Tensor:
        """What an expert gives for inputs, (T, D)."""
        gate, up, down = self.expert(e)
        gate_TF, up_TF, bias_D = x_TD @ gate.T, x_TD @ up.T, torch.zeros(())
        config = self.model.config
        assert config is not None, "a model with experts has a configuration of ours"
        if config.expert_bias:
            bias_F2 = (
                self.model.read(self.name(f"{GATE_UP}_bias"), 2 * e * self.F, 2 * (e + 1) * self.F).float().view(-1, 2)
            )
            gate_TF, up_TF = gate_TF + bias_F2[:, 0], up_TF + bias_F2[:, 1]
            bias_D = self.model.read(self.name(f"{DOWN}_bias"), e * self.D, (e + 1) * self.D).float()
        if config.swiglu_limit is None:
            return (functional.silu(gate_TF) * up_TF) @ down.T + bias_D
        gate_TF, up_TF = gate_TF.clamp(max=config.swiglu_limit), up_TF.clamp(-config.swiglu_limit, config.swiglu_limit)
        return (gate_TF * torch.sigmoid(config.swiglu_alpha * gate_TF) * (up_TF + 1)) @ down.T + bias_D

    def spans(self) -> Iterator[torch.Tensor]:
        """All experts' weights, a span of each at a time: (E, elements), fp32."""
        for suffix in (GATE_UP, DOWN):
            size = self.shapes[suffix][1] * self.shapes[suffix][2]
            step = max(1, SPAN // self.E)
            for start in range(0, size, step):
                stop = min(size, start + step)
                reads = [self.model.read(self.name(suffix), e * size + start, e * size + stop) for e in range(self.E)]
                yield torch.stack(reads).float()


def weight_similarity(a: _Layer, b: _Layer) -> torch.Tensor:
    """Cosine of the weights of each of a's experts with each of b's: (E, E)."""
    products, squares_a, squares_b = torch.zeros(a.E, a.E, dtype=torch.float64), torch.zeros(a.E), torch.zeros(b.E)
    for x, y in zip(a.spans(), b.spans()):
        products += x @ y.T
        squares_a, squares_b = squares_a + x.square().sum(1), squares_b + y.square().sum(1)
    return _cosines(products, squares_a, squares_b)


def function_similarity(a: _Layer, b: _Layer, x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
    """Cosine of what each of a's experts gives for inputs x with what each of b's gives for y: (E, E)."""
    outputs_a = [a.output(e, x_TD) for e in range(a.E)]
    products, squares = torch.zeros(a.E, a.E), torch.zeros(a.E)
    for f in range(b.E):
        output = b.output(f, y_TD)
        squares[f] = output.square().sum()
        for e, mine in enumerate(outputs_a):
            products[e, f] = (mine * output).sum()
    return _cosines(products, torch.stack([output.square().sum() for output in outputs_a]), squares)


def _cosines(products: torch.Tensor, squares_a: torch.Tensor, squares_b: torch.Tensor) -> torch.Tensor:
    norms = squares_a.double().sqrt()[:, None] * squares_b.double().sqrt()[None, :]
    return products.double() / norms.clamp(min=1e-30)


def match_neurons(
    a: tuple[torch.Tensor, torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Neuron k of expert a is neuron result[k] of b: (F,). The distance between the experts' weights is least.

    Holds an (F, F) matrix besides the two experts.
    """
    similarity = a[0] @ b[0].T
    similarity += a[1] @ b[1].T
    similarity += a[2].T @ b[2]
    scale = similarity.abs().max().item()
    return best_order(similarity, MARGIN * scale)


def best_order(similarity: torch.Tensor, margin: float) -> torch.Tensor:
    """The permutation p with the largest sum of similarity[i, p[i]]; the identity where it is within `margin` a row.

    Args:
        similarity: (n, n).
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    order = torch.from_numpy(columns)
    n, gain = len(order), similarity[rows, columns].sum() - similarity.diagonal().sum()
    return torch.arange(n) if gain <= margin * n else order


def moves(layer: _Layer, order: torch.Tensor, neurons_EF: torch.Tensor) -> dict[str, Move]:
    """Expert e of the result is expert order[e] of the layer, its neuron k that one's neuron neurons[e, k]."""
    E, D, F = layer.E, layer.D, layer.F
    moved = {layer.name(ROUTER): Move(order)}
    for vector in ("mlp.gate.bias", "mlp.gate.e_score_correction_bias"):  # an element an expert
        if layer.name(vector) in layer.model.shapes:
            moved[layer.name(vector)] = Move(torch.zeros(1, dtype=torch.int64), order[None])
    if layer.stacked:
        pairs_EG = torch.stack([2 * neurons_EF, 2 * neurons_EF + 1], 2).flatten(1)  # columns of gate and up in turn
        rows = (order[:, None] * D + torch.arange(D)).reshape(-1)
        return {
            **moved,
            layer.name(GATE_UP): Move(rows, pairs_EG),
            layer.name(DOWN): Move((order[:, None] * F + neurons_EF).reshape(-1)),
            layer.name(f"{GATE_UP}_bias"): Move(order, pairs_EG),
            layer.name(f"{DOWN}_bias"): Move(order),
        }
    block = torch.cat([neurons_EF, F + neurons_EF], dim=1)  # rows of gate, then of up
    return {
        **moved,
        layer.name(GATE_UP): Move((order[:, None] * 2 * F + block).reshape(-1)),
        layer.name(DOWN): Move((order[:, None] * D + torch.arange(D)).reshape(E * D), neurons_EF),
    }

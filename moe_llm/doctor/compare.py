"""Observations -> findings. `ranks` are the observations of the configured layout, `one` that of the one process."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moe_llm.config import Config, ModelConfig
from moe_llm.config.optim import ADAMW_TENSORS
from moe_llm.doctor.findings import Finding, exact, note, within
from moe_llm.doctor.observe import Observation, Tensors
from moe_llm.doctor.oracle.transformer import Expected
from moe_llm.families.hf import buffer_shapes, is_expert
from moe_llm.finetune.selection import trained_names

Whole = dict[str, np.ndarray]
FP32_EPS = 2.0**-23
# Muon rounds to bf16, and what rounding adds to small singular values grows to the size of the others. One process after
# another differs by 0.012 at most; ranks add their own rounding, over two steps: 0.02 as a rule, and 0.053 and 0.056 in two of 24 seeds.
ORTHOGONAL, ORTHOGONAL_ON_RANKS = 0.05, 0.15
# by `optim.master_weights`: the share of a weight that an update may lose or gain by rounding
ROUNDING = {"fp32": FP32_EPS, "kahan": 2.0**-15, "stochastic_rounding": 2.0**-7}


@dataclass(frozen=True)
class Tolerances:
    """Of the first step and of later ones, where differences have gone through the optimizer.

    loss, norm: relative. gradient: the largest value of the difference over that of the tensor; in bf16, where a token
    that goes to another expert spoils single values, root mean squares. gates: of the gradients of routers, where that is
    more. weights: root mean square relative to that of what training has changed. routing: share of the routed tokens.
    rounding: see `apart`. moments: of what a resumed run reads, over the largest; 0: equal to the bit. magnifies: the
    optimizer divides by the gradient's own size.
    """

    loss: tuple[float, float]
    gradient: float
    norm: tuple[float, float]
    weights: float
    routing: tuple[float, float]
    logits: float
    gates: float = 0.0
    in_bf16: bool = False
    rounding: float = FP32_EPS
    moments: float = 0.0
    magnifies: bool = True


def tolerances(config: Config) -> Tolerances:
    """What rounding may do in a run of this configuration."""
    allowed = _tolerances(config)
    if config.optim.name != "adamw_8bit":
        return allowed
    # a block through which ranks cut is packed in two parts, each by its own largest value
    return replace(allowed, weights=max(allowed.weights, 0.02), moments=0.02)


def _tolerances(config: Config) -> Tolerances:
    """By precision and optimizer: AdamW divides by the gradient's own size and so magnifies rounding where that is
    near zero, and in bf16 a token near the border between two experts may cross it."""
    if config.train.precision == "bf16":
        rounding = ROUNDING[config.optim.master_weights]
        return Tolerances((0.005, 0.03), 0.05, (0.01, 0.05), 0.3, (0.03, 0.10), 1e-4, in_bf16=True, rounding=rounding)
    # EM's gates have a gradient that is the posterior less the gate. At first these differ by a few per cent, and rounding of
    # the experts' losses (5e-7 of about 6, whoever computes it) is up to 1.1e-5 of that: seen in 12 seeds, and no less where
    # the oracle counts in double precision.
    gradient, gates = 1e-5, 3e-5 if config.model.router.type == "em" else 1e-5
    if config.optim.name == "muon":
        return Tolerances((1e-5, 1e-4), gradient, (1e-5, 1e-3), ORTHOGONAL_ON_RANKS, (0.0, 0.01), 1e-5, gates=gates)
    if config.optim.name != "sgd":
        return Tolerances((1e-5, 1e-4), gradient, (1e-5, 1e-3), 1e-3, (0.0, 0.01), 1e-5, gates=gates)
    return Tolerances((1e-5, 1e-5), gradient, (1e-5, 1e-5), 1e-4, (0.0, 0.01), 1e-5, gates=gates, magnifies=False)


def on_gpus(allowed: Tolerances) -> Tolerances:
    """In fp32, ten times as much: sums over atomics have no order there, and transformers' are formed on the CPU."""
    if allowed.in_bf16:
        return allowed
    ten: dict[str, Any] = {name: tuple(10 * x for x in getattr(allowed, name)) for name in ("loss", "norm")}
    return replace(
        allowed,
        **ten,
        gradient=10 * allowed.gradient,
        gates=10 * allowed.gates,
        weights=10 * allowed.weights,
        routing=(0.001, allowed.routing[1]),
        logits=10 * allowed.logits,
    )


def widened(allowed: Tolerances, ranks: Sequence[Observation], one: Observation) -> Tolerances:
    """In bf16, with room for what tokens that went to another expert change.

    A gradient is a sum over tokens. Where a share f of them gives other terms, of the same size and as if drawn anew,
    it changes by about sqrt(2 f) of its own size; twice that is allowed, as counts show the net of what moved.
    AdamW's first steps go by the gradient's sign, which noise r times as large as the gradient turns round in
    atan(r) / pi of all places: weights depart by the root of that.
    """
    if not allowed.in_bf16:
        return allowed
    first = max((share for share, step, _ in _moved(ranks, one) if step == 0), default=0.0)
    most = max((share for share, _, _ in _moved(ranks, one)), default=0.0)
    noise = math.hypot(allowed.gradient, 2 * math.sqrt(2 * most))
    turned = allowed.weights * math.sqrt(math.atan(noise) / math.atan(allowed.gradient))
    return replace(
        allowed,
        gradient=math.hypot(allowed.gradient, 2 * math.sqrt(2 * first)),
        weights=min(turned, 0.95),  # a weight that did not change at all departs by 1
    )


def whole(ranks: Sequence[Tensors]) -> Whole:
    """Whole tensors from the parts that ranks hold: experts by their index, dense ones from the first rank."""
    result: Whole = {}
    for name, held in {name: held for tensors in ranks for name, held in tensors.items()}.items():
        if held.first is None:
            result[name] = held.value
            continue
        parts = {tensors[name].first: tensors[name].value for tensors in ranks if name in tensors}
        result[name] = np.concatenate([parts[first] for first in sorted(parts, key=lambda first: first or 0)])
    return result


def samples(seen: Sequence[Observation], expected: list[list[str]], key: str, check: str) -> Finding:
    """Every block of each step is read once, by one rank, and belongs to that step."""
    wrong = []
    for at in range(len(seen[0].samples)):
        step = seen[0].first_step + at
        read = Counter(row for rank in seen for micro in rank.samples[at] for row in micro)
        due = Counter(expected[step])
        lost, extra = (due - read).total(), (read - due).total()
        if lost or extra:
            wrong.append(f"step {step + 1}: {lost} of {due.total()} blocks not read, {extra} read that were not due")
    return exact(key, check, wrong)


def tokens(ranks: Sequence[Observation], one: Observation) -> Finding:
    wrong = [
        f"step {step + 1}: {sum(seen)} over the ranks, {alone} in one process"
        for step, (*seen, alone) in enumerate(zip(*(rank.tokens for rank in ranks), one.tokens, strict=True))
        if sum(seen) != alone
    ]
    return exact("tokens", "tokens that are no padding, summed over the ranks", wrong)


LOSSES = {"lm_loss": "language-model loss", "aux_loss": "balance loss", "z_loss": "z-loss", "loss": "whole loss"}


def _padding(one: Observation) -> dict[str, list[str]]:
    """Evidence: the steps with padding, and those without."""
    room = [sum(batch.input_ids_BS.numel() for batch in batches) for batches in one.batches]
    steps: dict[str, list[str]] = {"padded": [], "full": []}
    for step, (count, size) in enumerate(zip(one.tokens, room, strict=True)):
        steps["padded" if count < size else "full"].append(f"step {step + 1}")
    return steps


def losses(
    ranks: Sequence[Observation], one: Observation, allowed: Tolerances, own: Sequence[str] = ()
) -> list[Finding]:
    """Loss by loss, each step. own: names of those that the router has beside them."""
    findings = []
    for name, title in (LOSSES | {name: f"router's {name}" for name in own}).items():
        compared = [
            (relative(record[name], alone[name]), allowed.loss[step > 0], f"step {step + 1}")
            for rank in ranks
            for step, (record, alone) in enumerate(zip(rank.records, one.records, strict=True))
        ]
        findings.append(within(name, title, compared, **_padding(one)))
    compared = [
        (relative(rank.records[-1]["val_loss"], one.records[-1]["val_loss"]), allowed.loss[1], "last step")
        for rank in ranks
    ]
    return [*findings, within("val_loss", "validation loss", compared)]


def norms(ranks: Sequence[Observation], one: Observation, allowed: Tolerances, clip: float) -> Finding:
    compared = [
        (relative(record["grad_norm"], alone["grad_norm"]), allowed.norm[step > 0], f"step {step + 1}")
        for rank in ranks
        for step, (record, alone) in enumerate(zip(rank.records, one.records, strict=True))
    ]
    active = f", clipped at {clip:.3g}" if clip else ", not clipped"
    return within("norm", f"norm of all gradients{active}", compared)


def gradients(found: Whole, expected: Whole, allowed: Tolerances, key: str, check: str) -> Finding:
    """Of the first step, tensor by tensor. Evidence: which kinds of tensors depart, and the factor if it is one."""
    size = _rms if allowed.in_bf16 else _largest
    floor = 1e-4 * max(size(value) for value in expected.values())
    compared: list[tuple[float, float, str]] = []
    factors: dict[str, float | None] = {}
    for name, value in expected.items():
        tolerance = max(allowed.gradient, allowed.gates if kind_of(name) == "routers" else 0.0)
        difference = size(found[name] - value) / max(size(value), floor)
        compared.append((difference, tolerance, name))
        if not difference <= tolerance:
            factors[name] = _factor(found[name], value, tolerance)
    kinds = sorted({kind_of(name) for name in factors})
    same = {round(f, 3) for f in factors.values() if f is not None}
    factor = same.pop() if len(same) == 1 and None not in factors.values() else None
    return within(
        key,
        check,
        compared,
        kinds=kinds,
        factor=factor,
        spared=sorted({kind_of(name) for name in expected} - set(kinds)),
    )


def _factor(found: np.ndarray, expected: np.ndarray, tolerance: float) -> float | None:
    """c where found = c * expected, else None."""
    square = float((expected.astype(np.float64) ** 2).sum())
    if not square or not np.isfinite(found).all():
        return None
    factor = float((found.astype(np.float64) * expected).sum()) / square
    rest = np.abs(found - factor * expected).max() / np.abs(expected).max()
    return factor if rest <= max(10 * tolerance, 1e-4) * max(1.0, abs(factor)) else None


def kind_of(name: str) -> str:
    if is_expert(name):
        return "experts"
    return "routers" if ".mlp.gate." in name else "dense"


def without_effect(model: ModelConfig) -> dict[str, np.ndarray]:
    """Elements of parameters that no output depends on, so that their gradients are rounding, which AdamW makes whole steps
    of: biases of keys where these are not turned by their positions, which add the same to all scores of a query."""
    turned = int(model.rotary_head_dim * model.rope_parameters.partial_rotary_factor)
    if model.latent_attention or model.attention_bias == "none" or turned >= model.attention_head_dim:
        return {}
    kept = np.tile(np.arange(model.attention_head_dim) >= turned, model.kv_heads)
    return {f"model.layers.{i}.self_attn.k_proj.bias": kept for i in range(model.num_hidden_layers)}


def weights(
    ranks: Sequence[Observation], one: Observation, allowed: Tolerances, idle: Mapping[str, np.ndarray] | None = None
) -> Finding:
    """After each step, measured against what training has changed so far.

    Args:
        idle: elements that are not compared, see `without_effect`.
    """
    idle, unsure = idle or {}, Unsure()
    start, compared = whole([one.start["weight"]]), []
    noise: dict[str, float] = {}
    for step in range(len(one.weights)):
        found, expected = whole([rank.weights[step] for rank in ranks]), whole([one.weights[step]])
        gradients = whole([rank.gradients[step] for rank in ranks]), whole([one.gradients[step]])
        unsure.add(*gradients)
        for name, value in expected.items():
            # those of the first step are compared by themselves
            if step and allowed.magnifies and name in gradients[1]:
                noise[name] = max(noise.get(name, 0.0), _noise(*(of_all[name] for of_all in gradients)))
            tolerance = max(allowed.weights, _turned(noise.get(name, 0.0)))
            own = ~unsure.elements(name, value)
            own &= ~idle[name] if name in idle else True
            change = (value - start[name])[own]
            far = apart(found[name][own], value[own], change, eps=allowed.rounding)
            compared.append((far, tolerance, f"{name} after step {step + 1}"))
    return within("weights", "weights after each step, against their change", compared)


def _noise(found: np.ndarray, expected: np.ndarray) -> float:
    """How far a gradient departs: root mean square of the difference over that of the gradient."""
    return _rms(found - expected) / size if expected.size and (size := _rms(expected)) else 0.0


def _turned(noise: float) -> float:
    """How far AdamW's weights may depart where their gradient does by a share `noise` (of which 1e-4 count at most: 0.011).

    A weight whose gradient rounding has turned round in the first step is set aside, but what it does to all gradients of
    the next step is not: there, as in bf16 (see `widened`), atan(noise) / pi of all places may go the other way.
    """
    return 2 * math.sqrt(math.atan(min(noise, 1e-4)) / math.pi)


class Unsure:
    """Elements whose gradient was so near zero that rounding has decided over it: AdamW makes whole steps of them."""

    def __init__(self) -> None:
        self._seen: dict[str, np.ndarray] = {}

    def add(self, found: Whole, expected: Whole) -> None:
        """A step's gradients in two layouts; of a parameter of which more are apart than by chance, none."""
        for name, value in expected.items():
            now = np.abs(found[name] - value) > 1e-3 * np.abs(value)
            if now.mean() <= 0.01:
                self._seen[name] = self._seen.get(name, False) | now

    def elements(self, name: str, like: np.ndarray) -> np.ndarray:
        """Of a parameter, in all steps so far."""
        return self._seen.get(name, np.zeros(like.shape, bool))


def apart(found: np.ndarray, expected: np.ndarray, change: np.ndarray, steps: int = 2, eps: float = FP32_EPS) -> float:
    """Root mean square of the difference over that of the change, rounding of the weights (by a share `eps` of them) in so
    many steps set aside."""
    if not expected.size:
        return 0.0
    rounding = steps * eps * _rms(expected)
    difference = max(0.0, _rms(found - expected) - rounding)
    return 0.0 if difference == 0 else difference / max(_rms(change), rounding)


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean()))


def start_weights(ranks: Sequence[Observation], one: Observation) -> Finding:
    found, expected = whole([rank.start["weight"] for rank in ranks]), whole([one.start["weight"]])
    wrong = [name for name, value in expected.items() if not np.array_equal(found[name], value)]
    return exact("start", "initial weights, to the bit", wrong)


def routing(ranks: Sequence[Observation], one: Observation, allowed: Tolerances) -> Finding:
    compared = [
        (share, allowed.routing[step > 0], f"step {step + 1}, layer {layer}")
        for share, step, layer in _moved(ranks, one)
    ]
    return within("routing", "tokens per expert, share that goes elsewhere", compared)


def _moved(ranks: Sequence[Observation], one: Observation) -> Iterator[tuple[float, int, int]]:
    """(share of the routed tokens that goes elsewhere, step, layer)."""
    for rank in ranks:
        for step, (record, alone) in enumerate(zip(rank.records, one.records, strict=True)):
            here, there = (np.array(r["moe"]["tokens_per_expert"]) for r in (record, alone))
            for layer, (a, b) in enumerate(zip(here, there)):
                yield float(abs(a - b).sum() / 2 / max(1, b.sum())), step, layer


def dropped(ranks: Sequence[Observation], one: Observation, allowed: Tolerances) -> Finding:
    """The share of choices that no expert had room for, in each layer."""
    compared = [
        (abs(here - there), allowed.routing[step > 0], f"step {step + 1}, layer {layer}")
        for rank in ranks
        for step, (record, alone) in enumerate(zip(rank.records, one.records, strict=True))
        for layer, (here, there) in enumerate(zip(record["moe"]["dropped_share"], alone["moe"]["dropped_share"]))
    ]
    largest = max(max(record["moe"]["dropped_share"]) for record in one.records)
    return within("dropped", f"share dropped for capacity (up to {largest:.0%} of a layer)", compared)


def cuts(cut: Observation, one: Observation, allowed: Tolerances, over: str) -> list[Finding]:
    """Micro-batches of one row beside larger ones, in fp32: by how much the balance loss departs where it goes by a
    prefix, and that nothing else does."""
    steps = range(len(cut.records) if over != "micro_batches" else 1)
    names = LOSSES if over != "micro_batches" else {"lm_loss": "", "z_loss": ""}
    compared = [
        (relative(cut.records[step][name], one.records[step][name]), allowed.loss[step > 0], f"{name}, step {step + 1}")
        for step in steps
        for name in names
    ]
    found = [within("cut", "losses, however the batch is cut into micro-batches", compared)]
    if over == "micro_batches":
        here, there = one.records[0]["aux_loss"], cut.records[0]["aux_loss"]
        if any(len(micro) > 1 for micro in one.samples):
            found.append(
                note(
                    f"model.balance_over=micro_batches: at step 1 the balance loss is {here:.5f} as configured and "
                    f"{there:.5f} in micro-batches of one row, and gradients differ accordingly; step makes them exact"
                )
            )
        return found
    slopes = gradients(
        whole([cut.gradients[0]]),
        whole([one.gradients[0]]),
        allowed,
        "cut_gradients",
        "gradients of step 1, however the batch is cut",
    )
    return [*found, slopes]


def trained(ranks: Sequence[Observation], config: Config) -> list[Finding]:
    """Each expert that got tokens, and each other tensor that got a gradient, has been changed by training."""
    start = whole([rank.start["weight"] for rank in ranks])
    end = whole([rank.weights[-1] for rank in ranks])
    slopes = [whole([rank.gradients[step] for rank in ranks]) for step in range(len(ranks[0].gradients))]
    stuck: dict[str, list[str]] = {"experts": [], "others": []}
    counted = idle = 0
    for name in slopes[0]:
        if not is_expert(name):
            if any(slope[name].any() for slope in slopes) and np.array_equal(start[name], end[name]):
                stuck["others"].append(name)
            continue
        some = config.finetune.experts
        for expert in range(len(start[name])) if some is None else sorted(set(some)):
            counted += 1
            if not any(slope[name][expert].any() for slope in slopes):
                idle += 1
            elif np.array_equal(start[name][expert], end[name][expert]):
                stuck["experts"].append(f"{name}, expert {expert}")
    title = "every expert's weights change" + (f" ({idle} of {counted} had no tokens)" if idle else "")
    return [exact("experts_train", title, stuck["experts"]), exact("others_train", "all else changes", stuck["others"])]


def frozen(ranks: Sequence[Observation], config: Config) -> Finding:
    """What `finetune` leaves out is what it was."""
    start = whole([rank.start["weight"] for rank in ranks])
    end = whole([rank.weights[-1] for rank in ranks])
    trained, some = set(trained_names(config)), config.finetune.experts
    wrong = []
    for name, value in start.items():
        if name in buffer_shapes(config.model):  # moved with the router, which may be trained
            continue
        if name not in trained:
            wrong += [] if np.array_equal(value, end[name]) else [name]
        elif some is not None and is_expert(name):
            wrong += [
                f"{name}, expert {e}"
                for e in range(len(value))
                if e not in some and not np.array_equal(value[e], end[name][e])
            ]
    return exact("frozen", "what is not trained is what it was, to the bit", wrong)


def against_fp32(one: Observation, precise: Observation) -> Finding:
    """The run in bf16 beside the same in fp32."""
    compared = [
        (relative(record["loss"], other["loss"]), 0.03, f"step {step + 1}")
        for step, (record, other) in enumerate(zip(one.records, precise.records, strict=True))
    ]
    return within("bf16", "whole loss in bf16 beside that in fp32", compared)


def against_transformers(
    one: Observation, expected: list[Expected], allowed: Tolerances, experts: Sequence[int] | None = None
) -> list[Finding]:
    """One process in fp32 against transformers: each step's losses and gradients: of these experts alone, where only
    they are trained."""
    findings = []
    for name, title in (("lm", "language-model loss"), ("aux", "balance loss"), ("z", "z-loss")):
        compared = [
            (relative(record[f"{name}_loss"], getattr(theirs, name)), allowed.loss[0], f"step {step + 1}")
            for step, (record, theirs) in enumerate(zip(one.records, expected, strict=True))
        ]
        findings.append(within(f"reference_{name}", f"{title}, as transformers computes it", compared, **_padding(one)))
    compared = [
        (relative(record[name], value), allowed.loss[0], f"{name}, step {step + 1}")
        for step, (record, theirs) in enumerate(zip(one.records, expected, strict=True))
        for name, value in theirs.own.items()
    ]
    if compared:
        title = "losses of the router's own, from the papers' formulas"
        findings.append(within("reference_own", title, compared, **_padding(one)))
    compared_norms = []
    for step, theirs in enumerate(expected):
        mine = whole([one.gradients[step]])
        slopes = {name: mine[name] if name in theirs.unsure else theirs.gradients[name] for name in mine}
        if experts is not None:
            for name in filter(is_expert, slopes):
                is_trained = np.isin(np.arange(len(slopes[name])), experts)
                slopes[name] = np.where(is_trained[:, None, None], slopes[name], 0)
        norm = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in slopes.values()))
        compared_norms.append((relative(one.records[step]["grad_norm"], norm), allowed.norm[0], f"step {step + 1}"))
        seen = gradients(
            mine,
            slopes,
            allowed,
            "reference_gradients",
            f"gradients of step {step + 1}, as transformers computes them",
        )
        if step == 0 or seen.failed:
            found = seen
        if seen.failed:
            break
    found.check = found.check if found.failed else "gradients of each step, as transformers computes them"
    if any(theirs.unsure for theirs in expected):
        findings.append(
            note(
                "experts are tied at the routers' first weights, so that the gradient of a loss of their own is not unique: "
                "routers' gradients are compared between layouts alone"
            )
        )
    norm_found = within("reference_norm", "norm of the gradients, as transformers computes them", compared_norms)
    return [*findings, found, norm_found]


def router_buffers(one: Observation, due: Mapping[str, np.ndarray]) -> Finding:
    """What routers have moved by rules of their own when the first checkpoint was written."""
    found = whole([one.at_save["weight"]])
    compared = [(_largest(found[name] - value) / max(_largest(value), 1e-6), 1e-4, name) for name, value in due.items()]
    return within("reference_buffers", "what routers move without a gradient, by their papers' rules", compared)


def resumed(
    title: str,
    key: str,
    straight: Sequence[Observation],
    after: Sequence[Observation],
    expected: list[list[str]],
    allowed: Tolerances,
) -> list[Finding]:
    """A run that went on at another layout.

    Args:
        straight: the run that wrote the checkpoint, and went on to its end. after: the one that resumed from it.
        expected: the samples of each step.
    """
    wrong, rounded = [], set()
    for kind in straight[0].at_save:
        before = whole([rank.at_save[kind] for rank in straight])
        now = whole([rank.start.get(kind, {}) for rank in after])
        for name, value in before.items():
            if name not in now or not _kept(now[name], value, allowed.moments if kind in ADAMW_TENSORS else 0.0):
                wrong.append(f"{kind} of {name}")
                rounded.add(_rounded_to(now.get(name), value))
    first = after[0].first_step
    pairs = [
        (f"step {first + at + 1}", record, alone)
        for rank in after
        for at, (record, alone) in enumerate(zip(rank.records, straight[0].records[first:], strict=True))
    ]
    compared = [(relative(record["loss"], alone["loss"]), allowed.loss[1], step) for step, record, alone in pairs]
    compared += [
        (abs(record["lr"] / alone["lr"] - 1), 1e-6, f"{step}, the learning rate") for step, record, alone in pairs
    ]
    return [
        exact(
            f"{key}_state",
            f"{title}: weights and optimizer, to the bit"
            + (", moments to 8 bits where ranks cut a block" if allowed.moments else ""),
            wrong,
            loaded_in=rounded.pop() if len(rounded) == 1 else None,
        ),
        samples(after, expected, f"{key}_data", f"{title}: no block lost or read again"),
        within(f"{key}_loss", f"{title}: losses and rates as if uninterrupted", compared),
    ]


def _kept(found: np.ndarray, value: np.ndarray, moments: float) -> bool:
    """Whether a tensor is what it was: to the bit, or within a share of its largest value."""
    if not moments:
        return np.array_equal(found, value)
    return found.shape == value.shape and _largest(found - value) <= moments * _largest(value)


def _rounded_to(found: np.ndarray | None, expected: np.ndarray) -> str | None:
    """The dtype to which values were rounded, if that is all that happened to them."""
    for dtype in (torch.bfloat16, torch.float16):
        if found is not None and np.array_equal(found, torch.from_numpy(expected).to(dtype).float().numpy()):
            return str(dtype).removeprefix("torch.")
    return None


def relative(found: float, expected: float) -> float:
    """|found - expected| over |expected|; where that is tiny, over the rounding of a sum around one."""
    return abs(found - expected) / max(abs(expected), 1e-3)

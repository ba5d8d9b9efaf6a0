"""What the counts say: specialisation against chance, repetition, co-selection, agreement.

Dimensions as in `inspect_counts`.
"""

from math import comb
from typing import Any

import numpy as np

from moe_llm.inspect.counts import RoutingCounts


def mutual_information(table: np.ndarray) -> np.ndarray:
    """Bits that rows and columns of each (..., A, B) table of counts tell of each other; 0 for an empty table."""
    total = table.sum((-2, -1), keepdims=True)
    joint = table / np.maximum(total, 1)
    rows, columns = joint.sum(-1, keepdims=True), joint.sum(-2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log2(joint / (rows * columns)), 0.0)
    return terms.sum((-2, -1))


def specialisation(counts: RoutingCounts, permutations: int = 999, seed: int = 0) -> dict[str, Any] | None:
    """Mutual information of source and expert, per layer and averaged, beside what chance gives; None for one source.

    Chance: the sources of whole units of text (documents, or pieces of long ones) are dealt out anew. Tokens of a
    document are alike whatever its source is, so permuting single tokens would call any two documents specialised.
    p-value: share of permutations, the observation among them, with at least as much (Phipson and Smyth 2010).

    by_tokens is the mutual information that would be seen if an expert were chosen by the token's id alone: what the
    sources' vocabularies explain.
    """
    if counts.sources < 2:
        return None
    unit_ULE, source_U = counts.unit_tables()
    flat_UX = unit_ULE.reshape(len(unit_ULE), -1).astype(np.float64)
    shape = (counts.sources, counts.layers, counts.experts)

    def by_layer(labels_U: np.ndarray) -> np.ndarray:
        one_hot_SU = (labels_U == np.arange(counts.sources)[:, None]).astype(np.float64)
        return mutual_information((one_hot_SU @ flat_UX).reshape(shape).transpose(1, 2, 0))

    observed_L = by_layer(source_U)
    random = np.random.default_rng(seed)
    chance_PL = np.array([by_layer(random.permutation(source_U)) for _ in range(permutations)])
    above_L = (chance_PL >= observed_L - 1e-12).sum(0)
    above = (chance_PL.mean(1) >= observed_L.mean() - 1e-12).sum()
    return {
        "bits": observed_L.tolist(),
        "chance_bits": chance_PL.mean(0).tolist(),
        "chance_95": np.quantile(chance_PL, 0.95, axis=0).tolist(),
        "p_value": ((1 + above_L) / (1 + permutations)).tolist(),
        "mean_bits": float(observed_L.mean()),
        "mean_chance_bits": float(chance_PL.mean()),
        "overall_p_value": float((1 + above) / (1 + permutations)),
        "by_tokens": _explained_by_tokens(counts).tolist(),
        "units": len(unit_ULE),
        "rows_per_unit": counts.unit_rows,
        "permutations": permutations,
    }


def _explained_by_tokens(counts: RoutingCounts) -> np.ndarray:
    bits = []
    for choices_EV in counts.choices_LEV:
        share_EV = choices_EV / np.maximum(choices_EV.sum(0), 1)
        bits.append(mutual_information(share_EV @ counts.token_SV.T))
    return np.array(bits)


def repetition(counts: RoutingCounts) -> dict[str, Any]:
    """How often consecutive tokens share their first choice, and any of their first two (Jiang et al. 2024, table 5).

    chance: of uniform random choices, 1/E and 1 - C(E-2, 2)/C(E, 2), about 46% for 8 experts.
    """
    E, width = counts.experts, min(2, counts.top_k)
    total = np.maximum(counts.consecutive_S.sum(), 1)
    by_source = counts.repeated_LS2 / np.maximum(counts.consecutive_S, 1)[None, :, None]
    overall = counts.repeated_LS2.sum(1) / total
    return {
        "first": overall[:, 0].tolist(),
        "first_or_second": overall[:, 1].tolist(),
        "first_by_source": by_source[..., 0].tolist(),
        "first_or_second_by_source": by_source[..., 1].tolist(),
        "chance_first": 1 / E,
        "chance_first_or_second": 1 - comb(E - width, width) / comb(E, width),
    }


def co_selection(counts: RoutingCounts) -> dict[str, Any] | None:
    """Tokens that chose two experts together, and their number over that of independent choices with these loads;
    None where a token has one expert."""
    if counts.top_k < 2:
        return None
    pairs_LEE = counts.together_LEE.astype(np.float64)
    load_LE = pairs_LEE.sum(-1)
    product_LEE = load_LE[:, :, None] * load_LE[:, None, :]
    product_LEE *= 1 - np.eye(counts.experts)
    scale = pairs_LEE.sum((1, 2), keepdims=True) / np.maximum(product_LEE.sum((1, 2), keepdims=True), 1e-300)
    expected_LEE = product_LEE * scale
    ratio_LEE = np.divide(pairs_LEE, expected_LEE, out=np.zeros_like(pairs_LEE), where=expected_LEE > 0)
    return {"tokens": counts.together_LEE.tolist(), "over_independent": ratio_LEE.tolist()}


def agreement(counts: RoutingCounts) -> dict[str, Any]:
    """Of each layer with the next, by first choices: share of tokens whose expert has the same index, with what the
    loads alone give, and bits that one choice tells of the other (indices mean nothing across layers, bits do)."""
    joint_LEE = counts.neighbours_LEE / np.maximum(counts.neighbours_LEE.sum((1, 2), keepdims=True), 1)
    same = np.trace(joint_LEE, axis1=1, axis2=2)
    chance = (joint_LEE.sum(2) * joint_LEE.sum(1)).sum(-1)
    return {
        "same_index": same.tolist(),
        "same_index_chance": chance.tolist(),
        "bits": mutual_information(counts.neighbours_LEE).tolist(),
    }


def top_tokens(counts: RoutingCounts, decode, shown: int = 12) -> list[list[list[dict[str, Any]]]]:
    """Per layer and expert the ids most often sent there, with the share of an id's occurrences that went there."""
    seen_V = counts.token_SV.sum(0)
    found = []
    for choices_EV in counts.choices_LEV:
        layer = []
        for count_V in choices_EV:
            best = np.argsort(-count_V, kind="stable")[:shown]
            layer.append(
                [
                    {
                        "id": int(i),
                        "text": decode(int(i)),
                        "count": int(count_V[i]),
                        "share": float(count_V[i] / seen_V[i]),
                    }
                    for i in best
                    if count_V[i]
                ]
            )
        found.append(layer)
    return found


def shares(counts: RoutingCounts) -> dict[str, Any]:
    """Choices by expert: of all, of each source, and of each class of position; each sums to 1 over the experts."""

    def over_experts(table: np.ndarray) -> list:
        return (table / np.maximum(table.sum(1, keepdims=True), 1)).tolist()

    load_LE = counts.sources_LES.sum(-1)
    return {
        "load": over_experts(load_LE),
        "by_source": over_experts(counts.sources_LES),
        "by_position": over_experts(counts.positions_LEP),
        "tokens_by_position": (counts.positions_LEP[0].sum(0) // counts.top_k).tolist(),
    }

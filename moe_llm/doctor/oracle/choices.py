"""Which experts a token has, and with which weights: routers from their papers' formulas.

Dimensions: T real tokens, document after document; n of one document; D hidden, E experts, K choices, G groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Tensors = Mapping[str, torch.Tensor]


class Choice(NamedTuple):
    """What a router makes of tokens.

    probability: its distribution over the experts. chosen: how much of each expert a token counts for, 1 or 0 for most.
    weight: what the experts' outputs are multiplied by. z: the token's z-loss. logits: of a linear map, where there is
    one. load: the probability that an expert would be chosen if its noise were drawn again (Shazeer et al. 2017).
    """

    probability_TE: torch.Tensor
    chosen_TE: torch.Tensor
    weight_TE: torch.Tensor
    z_T: torch.Tensor
    logits_TE: torch.Tensor
    load_TE: torch.Tensor | None = None

    def of(self, some_T: torch.Tensor) -> "Choice":
        """That of some of the tokens (bool)."""
        load_TE = None if self.load_TE is None else self.load_TE[some_T]
        always = [part[some_T] for part in (self.probability_TE, self.chosen_TE, self.weight_TE, self.z_T)]
        probability_TE, chosen_TE, weight_TE, z_T = always
        return Choice(probability_TE, chosen_TE, weight_TE, z_T, self.logits_TE[some_T], load_TE)


# The routers whose choice is that of `top_of_softmax`
OF_SOFTMAX = (
    "mixtral",
    "dense",
    "gshard",
    "noisy_top_k",
    "switch",
    "batch_prioritised",
    "deepseek_moe",
    "top_p",
    "multi_head",
    "em",
    "transformer",
)
_DIVIDED = ("mixtral", "dense", "gshard", "noisy_top_k", "em", "transformer")


def top_of_softmax(logits_TE: torch.Tensor, top_k: int, router: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(experts, their weights, whether they are taken at all), each (T, K), by the softmax over the experts.

    The weights are divided by their sum in Mixtral, GShard and noisy top-k gating (Shazeer et al. 2017, equation 3), and
    taken as they are in Switch (Fedus et al. 2021, equation 2), V-MoE (Riquelme et al. 2021, equation 2) and DeepSeekMoE
    (Dai et al. 2024, equation 10), there perhaps of the groups whose best expert is best (DeepSeek-V2 2024, section
    2.1.2). With top-p, experts are taken until their probabilities reach p (Huang et al. 2024, equation 5).
    """
    probability_TE = logits_TE.softmax(-1)
    groups, open_groups = getattr(router, "n_group", 1), getattr(router, "topk_group", 1)
    offered_TE = probability_TE
    if open_groups < groups:
        best_TG = probability_TE.unflatten(-1, (groups, -1)).amax(-1)
        offered_TE = _in_best_groups(probability_TE, best_TG, open_groups, 0.0)
    expert_TK = offered_TE.topk(top_k, dim=-1).indices
    value_TK = probability_TE.gather(-1, expert_TK)
    taken_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if router.type == "top_p":
        taken_TK[:, 1:] = value_TK.cumsum(-1)[:, :-1] < router.p
    divided = router.type in _DIVIDED or getattr(router, "norm_topk_prob", False)
    weight_TK = value_TK / value_TK.sum(-1, keepdim=True) if divided else value_TK
    return expert_TK, weight_TK * taken_TK * getattr(router, "routed_scaling_factor", 1.0), taken_TK


def of_logits(logits_TE: torch.Tensor, top_k: int, router: Any, deviation_TE: torch.Tensor | None = None) -> Choice:
    """That of `top_of_softmax`. deviation_TE: of the noise of each expert, where there is some."""
    expert_TK, weight_TK, taken_TK = top_of_softmax(logits_TE, top_k, router)
    load_TE = None if deviation_TE is None else _load(logits_TE, deviation_TE, top_k)
    return spread(logits_TE.softmax(-1), expert_TK, weight_TK, logits_TE, taken_TK=taken_TK)._replace(load_TE=load_TE)


def spread(
    probability_TE: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    *,
    taken_TK: torch.Tensor | None = None,
) -> Choice:
    """Choices and weights (T, K) as they lie over all experts; the z-loss is that of the logits
    (Zoph et al. 2022, equation 5)."""
    hot_TKE = F.one_hot(expert_TK, probability_TE.shape[-1]).float()
    counted_TKE = hot_TKE if taken_TK is None else hot_TKE * taken_TK[..., None]
    z_T = logits_TE.logsumexp(-1).square()
    return Choice(probability_TE, counted_TKE.sum(1), (hot_TKE * weight_TK[..., None]).sum(1), z_T, logits_TE)


def _load(logits_TE: torch.Tensor, deviation_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """P(x, e) = Phi((clean_e - kth of the others) / deviation_e), the noise itself being zero
    (Shazeer et al. 2017, equations 8 and 9)."""
    experts = logits_TE.shape[-1]
    if top_k == experts:
        return torch.ones_like(logits_TE)
    best_TK = logits_TE.topk(top_k + 1, dim=-1)
    chosen_TE = F.one_hot(best_TK.indices[..., :top_k], experts).sum(-2).bool()
    # the k-th of the others is the (k + 1)-th of all for those that are among the first k
    border_TE = torch.where(chosen_TE, best_TK.values[..., top_k:], best_TK.values[..., top_k - 1 : top_k])
    return torch.distributions.Normal(0.0, 1.0).cdf((logits_TE - border_TE) / deviation_TE)


def _in_best_groups(score_TE: torch.Tensor, score_TG: torch.Tensor, count: int, elsewhere: float) -> torch.Tensor:
    """The scores in the `count` best groups of neighbours, and a number outside of them."""
    is_open_TG = F.one_hot(score_TG.topk(count, dim=-1).indices, score_TG.shape[-1]).sum(1).bool()
    return score_TE.where(is_open_TG.repeat_interleave(score_TE.shape[-1] // score_TG.shape[-1], 1), elsewhere)


def score_shares(logits_TE: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, and their shares of the token's sum) of DeepSeek-V3's gate."""
    score_TE = torch.sigmoid(logits_TE) if kind == "sigmoid" else logits_TE.softmax(-1)
    return score_TE, score_TE / score_TE.sum(-1, keepdim=True)


def _of_biased_scores(x_TD: torch.Tensor, sizes: Sequence[int], gate: Tensors, top_k: int, router: Any) -> Choice:
    """Choice by score + bias, in the groups whose two best are best; weights by scores alone (DeepSeek-V3 2024, equations
    12 to 16)."""
    logits_TE = F.linear(x_TD, gate["weight"])
    score_TE, share_TE = score_shares(logits_TE, router.score)
    biased_TE = score_TE.detach() + gate["e_score_correction_bias"]
    if router.topk_group < router.n_group:
        pairs_TG = biased_TE.unflatten(-1, (router.n_group, -1)).topk(2, dim=-1).values.sum(-1)
        biased_TE = _in_best_groups(biased_TE, pairs_TG, router.topk_group, -math.inf)
    expert_TK = biased_TE.topk(top_k, dim=-1).indices
    weight_TK = score_TE.gather(-1, expert_TK)
    if router.norm_topk_prob:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return spread(share_TE, expert_TK, weight_TK * router.routed_scaling_factor, logits_TE)


def _of_groups(x_TD: torch.Tensor, sizes: Sequence[int], gate: Tensors, top_k: int, router: Any) -> Choice:
    """y = sum over the best groups of G(x)_g times sum over their best experts of G_g(x)_e (Shazeer et al. 2017, appendix
    B, equation 12)."""
    outer_TG = F.linear(x_TD, gate["group_weight"])
    inner_TGM = F.linear(x_TD, gate["weight"]).unflatten(-1, (router.groups, -1))
    probability_TE = (outer_TG.softmax(-1)[..., None] * inner_TGM.softmax(-1)).flatten(1)
    is_group_TG = F.one_hot(outer_TG.topk(router.groups_per_token).indices, router.groups).sum(1).bool()
    each = top_k // router.groups_per_token
    is_best_TGM = F.one_hot(inner_TGM.topk(each).indices, inner_TGM.shape[-1]).sum(-2).bool()
    outer_TG = outer_TG.masked_fill(~is_group_TG, -math.inf).softmax(-1)
    inner_TGM = inner_TGM.masked_fill(~is_best_TGM, -math.inf).softmax(-1)
    chosen_TE = (is_group_TG[..., None] & is_best_TGM).flatten(1)
    raw_TG, raw_TGM = F.linear(x_TD, gate["group_weight"]), F.linear(x_TD, gate["weight"])
    z_T = raw_TG.logsumexp(-1).square()
    z_T = z_T + raw_TGM.unflatten(-1, (router.groups, -1)).logsumexp(-1).square().mean(-1)
    weight_TE = (outer_TG[..., None] * inner_TGM).flatten(1)
    return Choice(probability_TE, chosen_TE.float(), weight_TE, z_T, probability_TE.log())


def _by_position(x_TD: torch.Tensor, sizes: Sequence[int], gate: Tensors, top_k: int, router: Any) -> Choice:
    """The experts s*K, ..., s*K + K - 1, modulo E, of a document's token s, weighted by a softmax over these."""
    logits_TE = F.linear(x_TD, gate["weight"])
    place_T = torch.cat([torch.arange(size) for size in sizes])
    expert_TK = torch.stack([place_T * top_k + k for k in range(top_k)], 1) % logits_TE.shape[-1]
    return spread(logits_TE.softmax(-1), expert_TK, logits_TE.gather(-1, expert_TK).softmax(-1), logits_TE)


_EQUAL = 2.0**-16  # scores that round to the same multiple of this count as equal: the earlier token is first


def taken_by_experts(score_nE: torch.Tensor, top_k: int, router: Any) -> torch.Tensor:
    """Each expert's best c n / E of a document's n tokens, c being `capacity_factor` times k (Zhou et al. 2022, section
    3.2), as 1 or 0, (n, E)."""
    n, experts = score_nE.shape
    factor = Fraction(router.capacity_factor).limit_denominator(1_000_000)
    room = math.ceil(factor * top_k * n / experts)
    order_nE = (score_nE.detach() / _EQUAL).round().sort(dim=0, descending=True, stable=True).indices
    return torch.zeros_like(score_nE).scatter(0, order_nE[:room], 1.0)


def _by_experts(x_TD: torch.Tensor, sizes: Sequence[int], gate: Tensors, top_k: int, router: Any) -> Choice:
    logits_TE = F.linear(x_TD, gate["weight"])
    probability_TE = logits_TE.softmax(-1)
    chosen_TE = torch.cat([taken_by_experts(part_nE, top_k, router) for part_nE in probability_TE.split(list(sizes))])
    z_T = logits_TE.logsumexp(-1).square()
    return Choice(probability_TE, chosen_TE, probability_TE * chosen_TE, z_T, logits_TE)


def _by_attention(x_TD: torch.Tensor, sizes: Sequence[int], gate: Tensors, top_k: int, router: Any) -> Choice:
    """The mean over heads of softmax(query . key / sqrt(d)) over learned keys of the experts (after Wu et al. 2024)."""
    query_HTK = F.linear(x_TD, gate["query_weight"]).unflatten(-1, (router.heads, -1)).transpose(0, 1)
    key_HEK = gate["weight"].unflatten(-1, (router.heads, -1)).transpose(0, 1)
    score_HTE = query_HTK @ key_HEK.mT / (math.sqrt(router.key_size) * router.temperature)
    probability_TE = score_HTE.softmax(-1).mean(0)
    value_TK, expert_TK = probability_TE.topk(top_k, dim=-1)
    found = spread(probability_TE, expert_TK, value_TK / value_TK.sum(-1, keepdim=True), probability_TE.log())
    return found._replace(z_T=score_HTE.logsumexp(-1).square().mean(0))


def _by_reading(x_TD: torch.Tensor, sizes: Sequence[int], gate: Tensors, top_k: int, router: Any) -> Choice:
    """A pre-norm block of attention and an MLP (Xiong et al. 2020) reads each document before the linear map."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return gate[name] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    read = []
    for x_nD in x_TD.split(list(sizes)):
        h_nW, place_n = F.linear(x_nD, gate["input_weight"]), torch.arange(len(x_nD))
        parts = F.linear(norm(h_nW, "attention_norm"), gate["qkv_weight"]).chunk(3, -1)
        q_Hnw, k_Hnw, v_Hnw = (part.unflatten(-1, (router.heads, -1)).transpose(0, 1) for part in parts)
        gap_nn = place_n[:, None] - place_n
        hidden_nn = (gap_nn < 0) | (gap_nn >= (router.window or len(x_nD)))
        score_Hnn = (q_Hnw @ k_Hnw.mT / math.sqrt(q_Hnw.shape[-1])).masked_fill(hidden_nn, -math.inf)
        attended_nW = (score_Hnn.softmax(-1) @ v_Hnw).transpose(0, 1).flatten(1)
        h_nW = h_nW + F.linear(attended_nW, gate["output_weight"])
        up_nU = F.gelu(F.linear(norm(h_nW, "mlp_norm"), gate["up_weight"]))
        read.append(norm(h_nW + F.linear(up_nU, gate["down_weight"]), "norm"))
    return of_logits(F.linear(torch.cat(read), gate["weight"]), top_k, router)


def _by_policy(x_TD: torch.Tensor, sizes: Sequence[int], gate: Tensors, top_k: int, router: Any) -> Choice:
    """The likeliest, all of one weight (nothing is drawn where runs are compared)."""
    logits_TE = F.linear(x_TD, gate["weight"])
    expert_TK = logits_TE.topk(top_k, dim=-1).indices
    weight_TK = torch.full_like(expert_TK, 1 / top_k, dtype=torch.float32)
    return spread(logits_TE.softmax(-1), expert_TK, weight_TK, logits_TE)


def _by_linear_map(x_TD: torch.Tensor, sizes: Sequence[int], gate: Tensors, top_k: int, router: Any) -> Choice:
    logits_TE = F.linear(x_TD, gate["weight"], gate.get("bias"))
    deviation_TE = F.softplus(F.linear(x_TD, gate["noise_weight"])) if "noise_weight" in gate else None
    return of_logits(logits_TE, top_k, router, deviation_TE)


RULES: dict[str, Callable[[torch.Tensor, Sequence[int], Tensors, int, Any], Choice]] = {
    **dict.fromkeys(OF_SOFTMAX, _by_linear_map),
    "transformer": _by_reading,
    "bias_balanced": _of_biased_scores,
    "hierarchical": _of_groups,
    "balanced": _by_position,
    "expert_choice": _by_experts,
    "attention": _by_attention,
    "reinforce": _by_policy,
}

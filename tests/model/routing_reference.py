"""Each router as its paper's equations say it, token by token: dense gates G (T, E), and who asked and was granted.

T tokens (B sequences of S positions), D hidden, E experts, K experts per token. Nothing here is the package's.
"""

import itertools
import math

import torch

INFINITY = float("inf")


def best(values, count):
    """Indices of the largest, in falling order."""
    return sorted(range(len(values)), key=lambda i: -float(values[i]))[:count]


def capacity(factor, length, top_k, experts):
    return math.ceil(factor * top_k * length / experts)


def seats(proposals, real, factor, top_k, experts, order=None):
    """Which proposals get a place, sequence by sequence: position by position with all of its choices; or, with an
    order of the positions, choice by choice. The room is a share of the sequence's real tokens; factor None: no limit.

    proposals: per sequence and position a list of experts. Returns sets of (sequence, position, choice).
    """
    granted = set()
    for b, sequence in enumerate(proposals):
        used = [0] * experts
        room = capacity(factor, sum(real[b]), top_k, experts) if factor else math.inf
        most = max(map(len, sequence))
        if order:
            turns = [(s, choice) for choice in range(most) for s in order[b]]
        else:
            turns = [(s, choice) for s in range(len(sequence)) for choice in range(most)]
        for s, choice in turns:
            if choice < len(sequence[s]) and real[b][s] and used[sequence[s][choice]] < room:
                used[sequence[s][choice]] += 1
                granted.add((b, s, choice))
    return granted


def dense(x_TD, p, real, **settings):
    """Jacobs et al. 1991: all experts, by the softmax."""
    return (x_TD @ p["weight"].T).softmax(-1), None


def mixtral(x_TD, p, real, top_k, **settings):
    """Jiang et al. 2024: Softmax(TopK(x W))."""
    return keep_top_k(x_TD @ p["weight"].T, top_k).softmax(-1), None


def keep_top_k(h_TE, k):
    """Shazeer et al. 2017, equation 5."""
    mask = torch.full_like(h_TE, -INFINITY)
    for t in range(len(h_TE)):
        for e in best(h_TE[t].tolist(), k):
            mask[t, e] = 0.0
    return h_TE + mask


def noisy_top_k(x_TD, p, real, top_k, noise_TE, **settings):
    """Shazeer et al. 2017, equations 3 and 4."""
    h_TE = x_TD @ p["weight"].T + noise_TE * torch.log1p(torch.exp(x_TD @ p["noise_weight"].T))
    return keep_top_k(h_TE, top_k).softmax(-1), None


em = mixtral


def attention(x_TD, p, real, top_k, heads, temperature=1.0, **settings):
    """Each head's softmax over the keys of the experts, their mean, the top k of it, renormalised."""
    out_TE = 0
    for query_KD, key_EK in zip(p["query_weight"].chunk(heads), p["weight"].chunk(heads, dim=1)):
        scores_TE = (x_TD @ query_KD.T) @ key_EK.T / (math.sqrt(len(query_KD)) * temperature)
        out_TE = out_TE + scores_TE.softmax(-1) / heads
    return keep_top_k(out_TE.log(), top_k).softmax(-1), None


def transformer(x_TD, p, real, top_k, heads, window=None, **settings):
    """A pre-norm block, position by position over the real tokens before it; then the top k, renormalised."""

    def norm(h_W, scale):
        return h_W / (h_W.square().mean() + 1e-6).sqrt() * scale

    rows, length = [], len(real[0])
    for b, mask in enumerate(real):
        h = [p["input_weight"] @ x_D for x_D in x_TD[b * length : (b + 1) * length]]
        q, k, v = zip(*((p["qkv_weight"] @ norm(h_W, p["attention_norm"])).chunk(3) for h_W in h))
        for s in range(length):
            seen = [t for t in range(s + 1) if mask[t]] if mask[s] else [s]
            seen = seen[-window:] if window else seen
            parts = []
            for head in range(heads):
                size = len(q[s]) // heads
                cut = slice(head * size, (head + 1) * size)
                share = torch.stack([q[s][cut] @ k[t][cut] / math.sqrt(size) for t in seen]).softmax(0)
                parts.append(sum(a * v[t][cut] for a, t in zip(share, seen)))
            h_W = h[s] + p["output_weight"] @ torch.cat(parts)
            up = p["up_weight"] @ norm(h_W, p["mlp_norm"])
            h_W = h_W + p["down_weight"] @ (up * 0.5 * (1 + torch.erf(up / math.sqrt(2))))
            rows.append(p["weight"] @ norm(h_W, p["norm"]))
    return keep_top_k(torch.stack(rows), top_k).softmax(-1), None


def reinforce(x_TD, p, real, top_k, noise_TE, **settings):
    """The largest of logits with Gumbel noise, all of the same weight; nothing of it has a gradient."""
    drawn = (x_TD @ p["weight"].T + noise_TE).tolist()
    out = torch.zeros(len(drawn), len(drawn[0]))
    for t, row in enumerate(drawn):
        out[t, best(row, top_k)] = 1 / top_k
    return out, None


def noisy_losses(x_TD, p, real_T, top_k, noise_TE):
    """Equations 6, 7 and 8 to 11: CV^2 of importance and of load, over real tokens."""
    gates_TE, _ = noisy_top_k(x_TD, p, None, top_k, noise_TE)
    clean_TE, deviation_TE = x_TD @ p["weight"].T, torch.log1p(torch.exp(x_TD @ p["noise_weight"].T))
    h_TE = clean_TE + noise_TE * deviation_TE
    load = []
    for t in range(len(x_TD)):
        row = []
        for e in range(h_TE.shape[1]):
            others = torch.cat([h_TE[t, :e], h_TE[t, e + 1 :]])
            kth_excluding = others[best(others.tolist(), top_k)[-1]]
            argument = (clean_TE[t, e] - kth_excluding) / deviation_TE[t, e]
            row.append(0.5 * (1 + torch.erf(argument / math.sqrt(2))))
        load.append(torch.stack(row))
    importance_E, load_E = gates_TE[real_T].sum(0), torch.stack(load)[real_T].sum(0)
    return [((v - v.mean()) ** 2).mean() / v.mean() ** 2 for v in (importance_E, load_E)]


def gshard(x_TD, p, real, top_k, drawn_T, factor, **settings):
    """Lepikhin et al. 2020, algorithm 1; drawn_T: uniform numbers, or None to dispatch every second choice."""
    gates_TE = (x_TD @ p["weight"].T).softmax(-1)
    length, experts = len(real[0]), gates_TE.shape[1]
    proposals, pairs = [], []
    for b in range(len(real)):
        proposals.append([])
        for s in range(length):
            t = b * length + s
            first, second = best(gates_TE[t].tolist(), 2)
            g1, g2 = gates_TE[t, first], gates_TE[t, second]
            pairs.append(((first, g1 / (g1 + g2)), (second, g2 / (g1 + g2))))
            goes = drawn_T is None or 2 * pairs[-1][1][1] > drawn_T[t]
            proposals[-1].append([first, second] if goes else [first])
    granted = seats(proposals, real, factor, 2, experts)
    out = torch.zeros_like(gates_TE)
    for b, s, choice in granted:
        expert, gate = pairs[b * length + s][choice]
        out[b * length + s, expert] = gate
    asked = sum(len(c) for row, mask in zip(proposals, real) for c, r in zip(row, mask) if r)
    return out, asked - len(granted)


def switch(x_TD, p, real, top_k, factor, **settings):
    """Fedus et al. 2021, equations 1 and 2: y = p_i(x) E_i(x) for the likeliest i, within capacity."""
    return by_probability(x_TD @ p["weight"].T, real, 1, factor, None)


def batch_prioritised(x_TD, p, real, top_k, factor, noise_TE, score, **settings):
    """Riquelme et al. 2021, section 2 and algorithm 2: sorted by the score of the routing weights."""
    return by_probability(x_TD @ p["weight"].T + noise_TE / p["weight"].shape[0], real, top_k, factor, score)


def by_probability(logits_TE, real, top_k, factor, score):
    gates_TE = logits_TE.softmax(-1)
    length, experts = len(real[0]), gates_TE.shape[1]
    chosen = [best(row, top_k) for row in gates_TE.tolist()]
    proposals = [chosen[b * length : (b + 1) * length] for b in range(len(real))]
    order = None
    if score is not None:
        of = [(max if score == "max" else sum)(gates_TE[t, e].item() for e in chosen[t]) for t in range(len(chosen))]
        order = [best(of[b * length : (b + 1) * length], length) for b in range(len(real))]
    granted = seats(proposals, real, factor, top_k, experts, order)
    out = torch.zeros_like(gates_TE)
    for b, s, choice in granted:
        t = b * length + s
        out[t, chosen[t][choice]] = gates_TE[t, chosen[t][choice]]
    return out, sum(map(sum, real)) * top_k - len(granted)


def top_p(x_TD, p, real, top_k, threshold, **settings):
    """Huang et al. 2024: the fewest likeliest experts whose probabilities sum to the threshold."""
    gates_TE = (x_TD @ p["weight"].T).softmax(-1)
    out = torch.zeros_like(gates_TE)
    for t in range(len(gates_TE)):
        reached = 0.0
        for e in best(gates_TE[t].tolist(), top_k):
            out[t, e] = gates_TE[t, e]
            reached += gates_TE[t, e].item()
            if reached >= threshold:
                break
    return out, None


def hierarchical(x_TD, p, real, top_k, groups, groups_per_token, **settings):
    """Shazeer et al. 2017, equation 12: sum over i, j of G_primary(x)_i G_i(x)_j E_ij(x)."""
    primary_TG = keep_top_k(x_TD @ p["group_weight"].T, groups_per_token).softmax(-1)
    size, parts = len(p["weight"]) // groups, []
    for g in range(groups):
        logits_TM = x_TD @ p["weight"][g * size : (g + 1) * size].T
        secondary_TM = keep_top_k(logits_TM, top_k // groups_per_token).softmax(-1)
        parts.append(primary_TG[:, g : g + 1] * secondary_TM)
    return torch.cat(parts, -1), None


def balanced(x_TD, p, real, top_k, **settings):
    """Round and round by position."""
    logits_TE = x_TD @ p["weight"].T
    mask, experts = torch.full_like(logits_TE, -INFINITY), logits_TE.shape[1]
    for t in range(len(logits_TE)):
        for k in range(top_k):
            mask[t, (t % len(real[0]) * top_k + k) % experts] = 0.0
    return (logits_TE + mask).softmax(-1), None


def deepseek_moe(x_TD, p, real, top_k, scale, share, **settings):
    """Dai et al. 2024, equations 9 to 11: g = s where s is among the top k of the softmax, else 0."""
    return _weighted((x_TD @ p["weight"].T).softmax(-1), None, top_k, scale, share), None


def bias_balanced(x_TD, p, real, top_k, scale, share, groups=1, groups_per_token=1, score="sigmoid", **settings):
    """DeepSeek-V3 2024, equations 13 to 16, and its node-limited choice: groups by their two best experts."""
    logits_TE = x_TD @ p["weight"].T
    score_TE = torch.sigmoid(logits_TE) if score == "sigmoid" else logits_TE.softmax(-1)
    biased = (score_TE + p["e_score_correction_bias"]).tolist()
    size = len(biased[0]) // groups
    for row in biased:
        worth = [sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        for g in set(range(groups)) - set(best(worth, groups_per_token)):
            row[g * size : (g + 1) * size] = [-INFINITY] * size
    return _weighted(score_TE, biased, top_k, scale, share), None


def lory(x_TD, p, real, top_k, length, **settings):
    """Zhong et al. 2024, section 3: each token's mixture, by the mean of the segment before its own; of the first, by
    what was learned."""
    rows, positions = [], len(real[0])
    for b, mask in enumerate(real):
        sequence, before, here = x_TD[b * positions : (b + 1) * positions], None, []
        for x_D, is_real in zip(sequence, mask):
            if is_real and len(here) == length:
                before, here = sum(here) / length, []
            logits_E = p["start"] if before is None else p["weight"] @ before
            rows.append(logits_E.softmax(-1))
            here += [x_D] * is_real
    return torch.stack(rows), None


def expert_choice(x_TD, p, real, top_k, factor, **settings):
    """Zhou et al. 2022, section 3.2: S = Softmax(X W), and G, I = TopK(S transposed, k = n c / e), n tokens of a
    sequence, c experts of a token on average."""
    score_TE = (x_TD @ p["weight"].T).softmax(-1)
    out, length, experts = torch.zeros_like(score_TE), len(real[0]), score_TE.shape[1]
    for b, e in itertools.product(range(len(real)), range(experts)):
        offers = [score_TE[b * length + s, e].item() if real[b][s] else -INFINITY for s in range(length)]
        for s in best(offers, capacity(factor, sum(real[b]), top_k, experts)):
            if real[b][s]:
                out[b * length + s, e] = score_TE[b * length + s, e]
    return out, None


def _weighted(score_TE, preferred, top_k, scale, share):
    """The scores of the k most preferred, or their shares, times `scale`."""
    out = torch.zeros_like(score_TE)
    for t, row in enumerate(score_TE.tolist() if preferred is None else preferred):
        chosen = best(row, top_k)
        total = sum(score_TE[t, e] for e in chosen) if share else 1.0
        for e in chosen:
            out[t, e] = scale * score_TE[t, e] / total
    return out


def soft_moe(x_BSD, p, real, documents, segment, slots, normalize, expert):
    """Puigcerver et al. 2023, section 2.1: slots D^T X with D = softmax over tokens of X Phi, outputs C Y with C =
    softmax over slots of it; D of one segment of a document and C of the next. Token by token; zero for all others.

    documents: a number for each position; expert(e, x_D): what expert e makes of one input.
    """
    phi_PD = p["weight"]
    if normalize:
        phi_PD = p["scale"] * phi_PD / phi_PD.norm(dim=1, keepdim=True)

    def logits(x_LD):
        return (x_LD / x_LD.norm(dim=1, keepdim=True) if normalize else x_LD) @ phi_PD.T

    out = {}
    for b in range(len(real)):
        for document in sorted(set(documents[b])):
            places = [s for s in range(len(real[b])) if real[b][s] and documents[b][s] == document]
            pieces = [places[i : i + segment] for i in range(0, len(places), segment)]
            for before, own in itertools.pairwise(pieces):
                x_LD = x_BSD[b, before]
                slot_PD = logits(x_LD).softmax(0).T @ x_LD
                y_PD = torch.stack([expert(i // slots, slot_D) for i, slot_D in enumerate(slot_PD)])
                for s in own:
                    out[b, s] = logits(x_BSD[b, [s]]).softmax(1)[0] @ y_PD
    zero_D = torch.zeros_like(x_BSD[0, 0])
    return torch.stack(
        [torch.stack([out.get((b, s), zero_D) for s in range(x_BSD.shape[1])]) for b in range(len(x_BSD))]
    )


def multi_head(x_TD, p, real, top_k, heads, share, expert, factor=None):
    """Wu et al. 2024: x W_head cut into parts, each the sum over its top k of g_e E_e(part), with g a softmax over all
    experts, and these side by side times W_merge. Part by part; with a limit, and None for the choices dropped.

    expert(e, x_W): what expert e makes of one part.
    """
    parts = [(p["head_proj.weight"] @ x_D).chunk(heads) for x_D in x_TD]
    gates = [[(p["weight"] @ part).softmax(0) for part in token] for token in parts]
    chosen = [[best(gate.tolist(), top_k) for gate in token] for token in gates]
    length, experts = len(real[0]), len(p["weight"])
    proposals = [
        [choice for token in chosen[b * length : (b + 1) * length] for choice in token] for b in range(len(real))
    ]
    wide = [[one for one in row for _ in range(heads)] for row in real]
    granted = seats(proposals, wide, factor, top_k, experts)
    out = []
    for t in range(len(x_TD)):
        row = []
        for h in range(heads):
            total = sum(gates[t][h][e] for e in chosen[t][h]) if share else 1.0
            row.append(
                sum(
                    (
                        gates[t][h][e] / total * expert(e, parts[t][h])
                        for i, e in enumerate(chosen[t][h])
                        if (t // length, t % length * heads + h, i) in granted
                    ),
                    torch.zeros_like(parts[t][h]),
                )
            )
        out.append(p["merge_proj.weight"] @ torch.cat(row))
    counts = [
        sum(e in chosen[t][h] for t in range(len(x_TD)) if real[t // length][t % length] for h in range(heads))
        for e in range(experts)
    ]
    return torch.stack(out), counts, sum(map(sum, wide)) * top_k - len(granted)

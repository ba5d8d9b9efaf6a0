"""Time each operation of moe_llm.ops against its reference twin and torch's own, forward and backward.

    python scripts/benchmarks/ops.py [--dtype bf16] [--threads 2] [--rounds 9] [--only experts]

The candidates of a group take turns within one process, so that a busy machine slows all of them alike: read
the ratios, not the times. A candidate whose output or gradients differ from the reference's is reported, not
timed.
"""

import argparse
import itertools
import statistics
import time

import torch
import torch.nn.functional as F

from moe_llm.ops import reference
from moe_llm.ops.attention import AttentionPattern, attention
from moe_llm.ops.cross_entropy import linear_cross_entropy
from moe_llm.ops.expert_mlp import expert_mlp
from moe_llm.ops.norm import rms_norm
from moe_llm.ops.permutation import combine, permute, sort_by_expert
from moe_llm.ops.rope import apply_rotary, rotary_cos_sin

# 4 x 512 tokens of a model with hidden 512, experts of 1792, 8 experts, top 2, vocabulary 8192
BATCH, LENGTH, HIDDEN, WIDTH, EXPERTS, TOP_K, VOCABULARY = 4, 512, 512, 1792, 8, 2, 8192
HEADS, GROUPS, HEAD_DIM = 8, 2, 64
TOKENS = BATCH * LENGTH


def normal(dtype, *shape, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def skewed_routing(experts: int, top_k: int, share: float) -> torch.Tensor:
    """(T, K) choices in which a `share` of the tokens has expert 0 among its own; 0: balanced at random."""
    score_TE = torch.rand(TOKENS, experts)
    score_TE[: int(share * TOKENS), 0] = 2
    return score_TE.topk(top_k).indices


def experts_group(dtype, experts, width, top_k, share):
    """Each call has counts of its own, as in training: kernels may be slow at shapes they have not seen."""
    routings = [sort_by_expert(skewed_routing(experts, top_k, share), experts)[3] for _ in range(100)]
    x = normal(dtype, TOKENS * top_k, HIDDEN)
    gate_up = normal(dtype, experts, 2 * width, HIDDEN, scale=HIDDEN**-0.5)
    down = normal(dtype, experts, HIDDEN, width, scale=width**-0.5)
    sequences = {label: itertools.cycle(routings) for label in ("reference", "fused", "grouped")}
    candidates = {
        "reference": lambda: reference.expert_mlp(x, gate_up, down, next(sequences["reference"])),
        "fused": lambda: expert_mlp(x, gate_up, down, next(sequences["fused"]), backend="fused"),
        "grouped": lambda: expert_mlp(x, gate_up, down, next(sequences["grouped"]), backend="grouped"),
    }
    return (x, gate_up, down), candidates


def weighted_experts_group(dtype):
    """The routing weight within the experts' products, or afterwards, in the combination."""
    token_index_N, _, slot_TK, counts_E = sort_by_expert(skewed_routing(EXPERTS, TOP_K, 0), EXPERTS)
    x, weight = normal(dtype, TOKENS, HIDDEN), torch.rand(TOKENS * TOP_K).requires_grad_()
    gate_up = normal(dtype, EXPERTS, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    down = normal(dtype, EXPERTS, HIDDEN, WIDTH, scale=WIDTH**-0.5)

    def within():
        x_ND = permute(x, token_index_N, slot_TK)
        y_ND = expert_mlp(x_ND, gate_up, down, counts_E, weight_N=weight)
        return combine(y_ND, None, token_index_N, TOKENS, slot_TK)

    def afterwards():
        y_ND = expert_mlp(permute(x, token_index_N, slot_TK), gate_up, down, counts_E)
        return combine(y_ND, weight, token_index_N, TOKENS, slot_TK)

    def twin():
        y_ND = reference.expert_mlp(reference.permute(x, token_index_N), gate_up, down, counts_E)
        return reference.combine(y_ND, weight, token_index_N, TOKENS)

    return (x, gate_up, down, weight), {"reference": twin, "within": within, "afterwards": afterwards}


def permutation_group(dtype):
    token_index_N, _, slot_TK, _ = sort_by_expert(skewed_routing(EXPERTS, TOP_K, 0), EXPERTS)
    x, weight = normal(dtype, TOKENS, HIDDEN), torch.rand(TOKENS * TOP_K).requires_grad_()

    def ours(slots):
        return combine(permute(x, token_index_N, slots), weight, token_index_N, TOKENS, slots)

    return (x, weight), {
        "reference": lambda: reference.combine(reference.permute(x, token_index_N), weight, token_index_N, TOKENS),
        "scattered": lambda: ours(None),
        "gathered": lambda: ours(slot_TK),
    }


def cross_entropy_group(dtype):
    hidden, weight = normal(dtype, TOKENS, HIDDEN), normal(dtype, VOCABULARY, HIDDEN, scale=HIDDEN**-0.5)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    candidates = {"reference": lambda: reference.linear_cross_entropy(hidden, weight, labels)[0]}
    for chunk in (256, 1024, None):
        candidates[f"chunk {chunk}"] = lambda c=chunk: linear_cross_entropy(hidden, weight, labels, chunk_tokens=c)[0]
    return (hidden, weight), candidates


def norm_group(dtype):
    x, weight = normal(dtype, BATCH, LENGTH, HIDDEN), torch.ones(HIDDEN, dtype=dtype).requires_grad_()
    return (x, weight), {
        "reference": lambda: reference.rms_norm(x, weight, 1e-5),
        "ours": lambda: rms_norm(x, weight, 1e-5),
        "torch": lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5),
    }


def rope_group(dtype):
    q, k = (normal(dtype, BATCH, LENGTH, heads, HEAD_DIM) for heads in (HEADS, GROUPS))
    cos, sin = rotary_cos_sin(torch.arange(LENGTH).expand(BATCH, LENGTH), HEAD_DIM, 1e4, dtype)

    def joined(rotate):
        return torch.cat(rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin), dim=1)

    return (q, k), {
        "reference": lambda: joined(reference.apply_rotary),
        "ours": lambda: joined(apply_rotary),
    }


def attention_group(dtype, batch, length, document):
    shapes = [(batch, length, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    leaves = [normal(dtype, *shape) for shape in shapes]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    document_ids = (torch.arange(length) // document).expand(batch, length)
    pattern = AttentionPattern.build(document_ids, document_ids=document_ids)
    sees = document_ids[:, :, None] == document_ids[:, None, :]
    mask = AttentionPattern((sees & torch.ones(length, length, dtype=torch.bool).tril())[:, None])
    return leaves, {
        "reference": lambda: attention(q, k, v, pattern=mask),  # the masked square
        "segments": lambda: attention(q, k, v, pattern=pattern),
    }


GROUPS_OF_CANDIDATES = {
    "experts 8 x 1792, balanced": lambda dtype: experts_group(dtype, EXPERTS, WIDTH, TOP_K, 0),
    "experts 8 x 1792, 60% to one": lambda dtype: experts_group(dtype, EXPERTS, WIDTH, TOP_K, 0.6),
    "experts 64 x 224, top 6": lambda dtype: experts_group(dtype, 64, 224, 6, 0),
    "experts, routing weights": weighted_experts_group,
    "permutation": permutation_group,
    "cross-entropy": cross_entropy_group,
    "norm": norm_group,
    "rope": rope_group,
    "attention 4 x 512, documents of 128": lambda dtype: attention_group(dtype, 4, 512, 128),
    "attention 4 x 512, documents of 400": lambda dtype: attention_group(dtype, 4, 512, 400),
    "attention 1 x 2048, documents of 400": lambda dtype: attention_group(dtype, 1, 2048, 400),
}


def run(leaves, candidate) -> list[torch.Tensor]:
    y = candidate()
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def departure(results, expected) -> float:
    """The largest difference, relative to the largest entry, over the output and all gradients."""
    return max(
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        for a, b in zip(results, expected, strict=True)
    )


def compare(name, leaves, candidates, tolerance, rounds) -> None:
    # each candidate runs once per comparison, so that all of them are given the same sequence of inputs
    results = {label: run(leaves, candidate) for label, candidate in candidates.items()}
    print(name)
    timed = {}
    for label, candidate in candidates.items():
        difference = departure(results[label], results["reference"])
        if difference > tolerance:
            print(f"  {label:12} differs from the reference by {difference:.1e}: not timed")
        else:
            timed[label] = candidate
    seconds = {label: [] for label in timed}
    for _ in range(rounds):
        for label, candidate in timed.items():
            start = time.perf_counter()
            run(leaves, candidate)
            seconds[label].append(time.perf_counter() - start)
    for label, samples in seconds.items():
        ratios = [own / base for own, base in zip(samples, seconds["reference"], strict=True)]
        print(f"  {label:12} {statistics.median(samples) * 1e3:9.2f} ms   {statistics.median(ratios):5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="groups whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype, tolerance = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 2e-2)}[arguments.dtype]
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.dtype}; ratio to the reference")
    for name, build in GROUPS_OF_CANDIDATES.items():
        if arguments.only in name:
            compare(name, *build(dtype), tolerance, arguments.rounds)


if __name__ == "__main__":
    main()

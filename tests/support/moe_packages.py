"""Stand-ins for the packages of scripts/benchmarks/other_layers.py that need CUDA: what those layers call, by the same
names, arguments, shapes, layouts and complaints, with the arithmetic of a plain loop over experts."""

import enum
import sys
import types
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


def install(monkeypatch) -> None:
    """Import them from now on, until the test ends."""
    tree = {
        "scattermoe": {},
        "scattermoe.mlp": {"GLUMLP": GLUMLP},
        "megablocks": {},
        "megablocks.layers": {},
        "megablocks.layers.arguments": {"Arguments": Arguments},
        "megablocks.layers.dmoe": {"ParallelDroplessMLP": ParallelDroplessMLP},
        "sonicmoe": {"MoE": SonicMoE, "moe_TC_softmax_topk_layer": moe_TC_softmax_topk_layer},
        "sonicmoe.enums": {"ActivationType": ActivationType},
    }
    for name, contents in tree.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def by_expert(x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, experts: int, run) -> Tensor:
    """The weighted sum over each token's experts of `run(expert, rows)`."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(experts):
        token_N, choice_N = (expert_TK == e).nonzero(as_tuple=True)
        y_ND = run(e, x_TD[token_N]) * weight_TK[token_N, choice_N, None]
        y_TD = y_TD.index_add(0, token_N, y_ND.to(y_TD.dtype))
    return y_TD


class ParallelExperts(nn.Module):
    def __init__(self, num_experts: int, input_size: int, output_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))


class GLUMLP(nn.Module):
    """scattermoe.mlp.GLUMLP of 0.3.0."""

    def __init__(self, input_size, hidden_size, num_experts, top_k, bias=False, activation=None):
        super().__init__()
        assert not bias
        self.num_experts, self.top_k, self.activation = num_experts, top_k, activation
        self.experts = ParallelExperts(num_experts, input_size, 2 * hidden_size)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size)

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        if expert_p.dtype != x.dtype:
            raise RuntimeError("the routing weights meet the outputs in a product")
        assert expert_idxs.shape == (*x.shape[:-1], self.top_k)

        def run(e: int, x_ND: Tensor) -> Tensor:
            up_NF, gate_NF = linear(x_ND, self.experts.weight[e]).chunk(2, -1)
            return linear(self.activation(gate_NF) * up_NF, self.output_experts.weight[e])

        return by_expert(x, expert_p, expert_idxs, self.num_experts, run)


@dataclass
class Arguments:
    """megablocks.layers.arguments.Arguments of 0.10.0, as far as a dropless layer on one device reads it."""

    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    bias: bool = True
    activation_fn: object = nn.functional.gelu
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_loss_weight: float = 0.1
    mlp_type: str = "mlp"
    mlp_impl: str = "sparse"
    fp16: bool = True
    bf16: bool = False
    device: torch.device | None = None  # there: the current CUDA device


class GroupedGLU(nn.Module):
    def __init__(self, args: Arguments):
        super().__init__()
        dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None
        rows = args.moe_num_experts * args.ffn_hidden_size
        for name in ("w1", "w2", "v1"):
            weight = torch.empty(rows, args.hidden_size, device=args.device, dtype=dtype)
            setattr(self, name, nn.Parameter(weight))


class ParallelDroplessMLP(nn.Module):
    """megablocks.layers.dmoe.ParallelDroplessMLP of 0.10.0."""

    def __init__(self, args: Arguments):
        super().__init__()
        assert not args.bias
        assert (args.mlp_type, args.mlp_impl) == ("glu", "grouped")
        self.args, self.mlp = args, GroupedGLU(args)
        self.balance_losses: list = []

    def forward(self, x: Tensor, scores: Tensor, expert_weights: Tensor, top_experts: Tensor) -> Tensor:
        experts = self.args.moe_num_experts
        assert x.is_contiguous()
        assert expert_weights.shape == top_experts.shape == (x.shape[0], self.args.moe_top_k)
        w1_EFD, v1_EFD, w2_EFD = (w.view(experts, -1, x.shape[-1]) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        if self.training and self.args.moe_loss_weight > 0:
            self.balance_losses.append(scores.mean(0))

        def run(e: int, x_ND: Tensor) -> Tensor:
            h_NF = self.args.activation_fn(x_ND @ w1_EFD[e].T) * (x_ND @ v1_EFD[e].T)
            return h_NF @ w2_EFD[e]

        return by_expert(x, expert_weights, top_experts, experts, run)


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"


class SonicExperts(nn.Module):
    def __init__(self, num_experts: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))


class SonicMoE(nn.Module):
    """sonicmoe.MoE of 0.1.2."""

    def __init__(
        self, num_experts, num_experts_per_tok, hidden_size, intermediate_size, activation_function, add_bias, std
    ):
        super().__init__()
        assert not add_bias
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.activation_function = activation_function
        self.c_fc = SonicExperts(num_experts, hidden_size, 2 * intermediate_size)
        self.c_proj = SonicExperts(num_experts, intermediate_size, hidden_size)
        self.stream_id = 0  # there: of the current CUDA stream


def moe_TC_softmax_topk_layer(
    x,
    router_w,
    w1,
    b1,
    w2,
    b2,
    K,
    stream_id,
    activation_type=ActivationType.SWIGLU,
    is_inference_mode_enabled=False,
    is_softmax_over_topk=True,
    norm_topk_probs=False,
    concat_layout=False,
):
    """sonicmoe.moe_TC_softmax_topk_layer of 0.1.2: (2F, D, E) and (D, F, E), with the experts' stride the largest."""
    assert b1 is None
    assert b2 is None
    assert activation_type is ActivationType.SWIGLU
    assert is_softmax_over_topk
    assert not is_inference_mode_enabled
    assert not concat_layout
    assert w1.permute(2, 0, 1).is_contiguous()
    assert w2.permute(2, 0, 1).is_contiguous()
    logits_TE = linear(x, router_w)
    top_TK, expert_TK = logits_TE.float().topk(K, -1)

    def run(e: int, x_ND: Tensor) -> Tensor:
        h_N2F = linear(x_ND, w1[..., e])
        return linear(silu(h_N2F[:, ::2]) * h_N2F[:, 1::2], w2[..., e])

    experts = router_w.shape[0]
    y_TD = by_expert(x, top_TK.softmax(-1), expert_TK, experts, run)
    return y_TD, logits_TE, expert_TK.flatten().bincount(minlength=experts).int()

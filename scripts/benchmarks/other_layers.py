"""The MoE layers of other packages, with the weights of transformers' Mixtral layer that each is to replace.

A layer takes and returns (batch, length, hidden), drops no token, keeps the logits that it routed by in `logits`, and
gives its gradients by the names of transformers' parameters. A package is imported when its layer is made. Weights are
loaded strictly, so a release that names or shapes its parameters otherwise is reported, like a package that is missing;
one that only orders them otherwise computes something else, which the check of the gradients finds.

What the packages want of a machine: DeepSpeed nothing; ScatterMoE CUDA and Triton; MegaBlocks CUDA, bf16 and
grouped_gemm (its sparse kernels ask for a Triton before 3.2); SonicMoE Hopper or later and half precision.

T tokens, D hidden, F expert width, E experts, K experts of a token.
"""

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


class DeepSpeedLayer(nn.Module):
    """deepspeed.moe.layer.MoE, dropping nothing. It makes a process group of one where there is none."""

    def __init__(self, shape, theirs: nn.Module, dtype: torch.dtype):
        super().__init__()
        from moe_llm.distributed.deepspeed import prepare_environment

        prepare_environment(cpu=not torch.cuda.is_available(), world_size=1)
        import deepspeed
        from deepspeed.moe.layer import MoE

        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        self.moe = MoE(
            shape.hidden,
            SwiGLU(shape.hidden, shape.width),
            num_experts=shape.experts,
            k=shape.top_k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        ).to(dtype)
        self.moe.set_deepspeed_parallelism()
        self.gate = self.moe.deepspeed_moe.gate.wg
        self.experts = list(self.moe.deepspeed_moe.experts.deepspeed_experts)
        self.logits: Tensor | None = None
        with torch.no_grad():
            self.gate.weight.copy_(theirs.gate.weight)
            for e, expert in enumerate(self.experts):
                expert.gate_up.weight.copy_(theirs.experts.gate_up_proj[e])
                expert.down.weight.copy_(theirs.experts.down_proj[e])

    def forward(self, x_BSD: Tensor) -> Tensor:
        self.logits = self.gate(x_BSD.flatten(0, 1))
        return self.moe(x_BSD)[0]

    def gradients(self) -> Weights:
        return {
            "gate.weight": self.gate.weight.grad,
            "experts.gate_up_proj": torch.stack([expert.gate_up.weight.grad for expert in self.experts]),
            "experts.down_proj": torch.stack([expert.down.weight.grad for expert in self.experts]),
        }


class SwiGLU(nn.Module):
    """One expert."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_up, self.down = nn.Linear(hidden, 2 * width, bias=False), nn.Linear(width, hidden, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TD).chunk(2, -1)
        return self.down(nn.functional.silu(gate_TF) * up_TF)


class PackedLayer(nn.Module):
    """A layer whose package holds transformers' weights in a layout of its own.

    Subclasses build the package's module on the meta device, and give its weights (`pack`) and the way back (`unpack`)
    by the names of the state dictionaries on both sides. Unless `routes`, transformers' router stays.
    """

    routes = False

    def __init__(self, shape, theirs: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.shape = shape
        self.package = self.build(shape, dtype)
        self.package.load_state_dict(self.pack({n: p.detach() for n, p in theirs.named_parameters()}), assign=True)
        if not self.routes:
            self.gate = theirs.gate
        self.logits: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        self.logits, weight_TK, expert_TK = self.gate(x_TD)
        return self.experts(x_TD, weight_TK, expert_TK).view_as(x_BSD)

    def gradients(self) -> Weights:
        found = self.unpack({name: p.grad for name, p in self.package.named_parameters()}, self.shape.experts)
        return found if self.routes else {"gate.weight": self.gate.weight.grad, **found}


class ScatterMoELayer(PackedLayer):
    """scattermoe.mlp.GLUMLP, of 0.3.0. The up projection comes before the gate; it takes routing weights only in the
    activations' dtype."""

    @staticmethod
    def build(shape, dtype: torch.dtype) -> nn.Module:
        from scattermoe.mlp import GLUMLP

        with torch.device("meta"):
            return GLUMLP(
                input_size=shape.hidden,
                hidden_size=shape.width,
                num_experts=shape.experts,
                top_k=shape.top_k,
                activation=nn.SiLU(),
            )

    @staticmethod
    def pack(theirs: Weights) -> Weights:
        gate_EFD, up_EFD = theirs["experts.gate_up_proj"].chunk(2, 1)
        return {
            "experts.weight": torch.cat([up_EFD, gate_EFD], 1),
            "output_experts.weight": theirs["experts.down_proj"],
        }

    @staticmethod
    def unpack(packed: Weights, experts: int) -> Weights:
        up_EFD, gate_EFD = packed["experts.weight"].chunk(2, 1)
        return {
            "experts.gate_up_proj": torch.cat([gate_EFD, up_EFD], 1),
            "experts.down_proj": packed["output_experts.weight"],
        }

    def experts(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        return self.package(x_TD, weight_TK.to(x_TD.dtype), expert_TK)


class MegaBlocksLayer(PackedLayer):
    """megablocks.layers.dmoe.ParallelDroplessMLP, of 0.10.0, by grouped products: gate, up and down are matrices of
    their own, (E * F, D) each."""

    @staticmethod
    def build(shape, dtype: torch.dtype) -> nn.Module:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import ParallelDroplessMLP

        return ParallelDroplessMLP(
            Arguments(
                hidden_size=shape.hidden,
                ffn_hidden_size=shape.width,
                bias=False,
                activation_fn=nn.functional.silu,
                moe_num_experts=shape.experts,
                moe_top_k=shape.top_k,
                moe_loss_weight=0,  # else it would keep what its own balance loss needs, step after step
                mlp_type="glu",
                mlp_impl="grouped",
                fp16=dtype == torch.float16,
                bf16=dtype == torch.bfloat16,
                device=torch.device("meta"),
            )
        )

    @staticmethod
    def pack(theirs: Weights) -> Weights:
        gate_EFD, up_EFD = theirs["experts.gate_up_proj"].chunk(2, 1)
        down_EFD = theirs["experts.down_proj"].transpose(1, 2)
        names = {"mlp.w1": gate_EFD, "mlp.v1": up_EFD, "mlp.w2": down_EFD}
        return {name: w_EFD.flatten(0, 1).contiguous() for name, w_EFD in names.items()}

    @staticmethod
    def unpack(packed: Weights, experts: int) -> Weights:
        gate_EFD, up_EFD, down_EFD = (packed[f"mlp.{n}"].unflatten(0, (experts, -1)) for n in ("w1", "v1", "w2"))
        return {
            "experts.gate_up_proj": torch.cat([gate_EFD, up_EFD], 1),
            "experts.down_proj": down_EFD.transpose(1, 2).contiguous(),
        }

    def experts(self, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        scores = None  # for its own balance loss
        return self.package(x_TD, scores, weight_TK, expert_TK)


class SonicMoELayer(PackedLayer):
    """sonicmoe.MoE, of 0.1.2, with its fused router, a softmax over the chosen logits. Rows of gate and up take turns.

    It is called as its `forward` does, which keeps the logits to itself.
    """

    routes = True

    @staticmethod
    def build(shape, dtype: torch.dtype) -> nn.Module:
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        with torch.device("meta"):
            return MoE(
                num_experts=shape.experts,
                num_experts_per_tok=shape.top_k,
                hidden_size=shape.hidden,
                intermediate_size=shape.width,
                activation_function=ActivationType.SWIGLU,
                add_bias=False,
                std=0.02,
            )

    @staticmethod
    def pack(theirs: Weights) -> Weights:
        gate_EFD, up_EFD = theirs["experts.gate_up_proj"].chunk(2, 1)
        return {
            "router.weight": theirs["gate.weight"],
            "c_proj.weight": theirs["experts.down_proj"],
            "c_fc.weight": torch.stack([gate_EFD, up_EFD], 2).flatten(1, 2),
        }

    @staticmethod
    def unpack(packed: Weights, experts: int) -> Weights:
        gate_EFD, up_EFD = packed["c_fc.weight"][:, ::2], packed["c_fc.weight"][:, 1::2]
        return {
            "gate.weight": packed["router.weight"],
            "experts.down_proj": packed["c_proj.weight"],
            "experts.gate_up_proj": torch.cat([gate_EFD, up_EFD], 1),
        }

    def forward(self, x_BSD: Tensor) -> Tensor:
        from sonicmoe import moe_TC_softmax_topk_layer

        moe, no_bias = self.package, None
        y_TD, self.logits, _ = moe_TC_softmax_topk_layer(
            x_BSD.flatten(0, 1),
            moe.router.weight,
            moe.c_fc.weight.permute(1, 2, 0),
            no_bias,
            moe.c_proj.weight.permute(1, 2, 0),
            no_bias,
            self.shape.top_k,
            moe.stream_id,
            moe.activation_function,
        )
        return y_TD.view_as(x_BSD)


# contender -> its layer; the contender's name is the package's
LAYERS = {
    "deepspeed": DeepSpeedLayer,
    "scattermoe": ScatterMoELayer,
    "megablocks": MegaBlocksLayer,
    "sonicmoe": SonicMoELayer,
}

"""The models that `step.py` compares: the same weights and the same batches for each of them."""

import importlib.util
from dataclasses import dataclass, replace

import torch
from other_layers import LAYERS
from torch import Tensor, nn

from moe_llm.config import ModelConfig
from moe_llm.model.decoder import MoEDecoder
from moe_llm.ops import kernels

# transformers' experts that hold a copy of the weights for every routed row: 15 GB a layer at the main shape
_COPIES_WEIGHTS = "batched_mm"
# contender -> what it cannot do without; transformers fetches kernels by the package of that name
_NEEDS = {
    **{name: name for name in LAYERS},
    "transformers:deepgemm": "kernels",
    "transformers:sonicmoe": "kernels",
    "ours:liger": "liger_kernel",
}
# `ours:NAME` on CUDA: (train.kernels, train.compile); plain `ours` is torch's operations as they are
OUR_KERNELS = {"liger": ("liger", False), "compiled": ("torch", True)}


@dataclass(frozen=True)
class Shape:
    """A model and a batch. share: of the tokens that expert 0 is forced upon; 0: as the random router has it."""

    batch: int
    length: int
    hidden: int = 512
    width: int = 1792
    experts: int = 8
    top_k: int = 2
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 8192
    share: float = 0.0

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
            max_position_embeddings=max(self.length, 64),
            router_aux_loss_scope="transformers",
        )


MIXTRAL_LAYER = Shape(1, 512, hidden=4096, width=14336, layers=1, heads=32, kv_heads=8, vocabulary=32000)
# On CUDA: layers is how many are asked for, of which as many are taken as fit.
CUDA = {
    "Mixtral 8x7B": replace(MIXTRAL_LAYER, length=4096, layers=32),
    "64 experts, top 6": Shape(
        2, 4096, hidden=2048, width=1408, experts=64, top_k=6, layers=8, heads=16, kv_heads=16, vocabulary=32000
    ),
}


def shape_that_fits(shape: Shape, contenders: int, dtype: torch.dtype, free_bytes: float) -> Shape:
    """With as many of its layers as leave a quarter of the memory to activations, when each contender holds weights,
    the one at work gradients too, and the fp32 reference and the bare products both."""
    item = torch.finfo(dtype).bits // 8
    for layers in range(shape.layers, 1, -1):
        parameters = sum(replace(shape, layers=layers).config.parameter_counts().values())
        if parameters * (item * (contenders + 3) + 8) <= 0.75 * free_bytes:
            return replace(shape, layers=layers)
    return replace(shape, layers=1)


def weights(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Random fp32 weights by name, those of a fresh model but for what steers the routing.

    Residual component 0 is +1 in the embeddings of `share` of the vocabulary and -1 in the others, nothing writes to
    it later, and expert 0's router row reads little else: it is the first choice of the one and no choice of the
    other. The other rows are as large as it takes for choices to be clear.
    """
    from moe_llm.model.init import build_model

    state = build_model(shape.config, seed).state_dict()
    generator = torch.Generator().manual_seed(seed)
    embedding = state["model.embed_tokens.weight"]
    if shape.share:
        embedding[:, 0] = -8 * embedding.std()
        embedding[: round(shape.share * shape.vocabulary), 0] *= -1
    for name, tensor in state.items():
        if name.endswith("gate.weight"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 2 * shape.hidden**-0.5)
            if shape.share:
                tensor[:, 0] = 0
                tensor[0] = 0
                tensor[0, 0] = 4.0
        elif shape.share and name.endswith(("o_proj.weight", "down_proj")):
            tensor[..., 0, :] = 0
    return state


def batches(shape: Shape, count: int, seed: int = 1) -> list[Tensor]:
    """Token ids; every batch routes differently, so that no shape of a product repeats by accident."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(shape.vocabulary, (shape.batch, shape.length), generator=generator) for _ in range(count)]


class Ours(nn.Module):
    """This package's decoder, as the training loop calls it."""

    def __init__(self, shape: Shape, state: dict[str, Tensor], dtype: torch.dtype, parts: str | None = None):
        """parts: of `OUR_KERNELS`; None: torch's operations."""
        super().__init__()
        self.kernels = ("torch", False) if parts is None else OUR_KERNELS[parts]
        with torch.device("meta"):
            self.model = MoEDecoder(shape.config).to(dtype)
        self.model.to_empty(device="cpu")
        self.model.load_state_dict(state)

    def forward(self, ids: Tensor) -> Tensor:
        kernels.choose(*self.kernels, ids.device)  # and they stay on for the backward pass that follows
        return self.model(ids, labels=ids, return_logits=False).loss

    def gradients(self) -> dict[str, Tensor]:
        """By the names of `weights`."""
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def counts(self, ids: Tensor) -> list[list[int]]:
        """Tokens of each expert in each layer."""
        return self.model(ids, return_logits=False).routing.tokens_per_expert_E.int().tolist()


class Transformers(nn.Module):
    """transformers' Mixtral, attention by torch's fused kernels, experts by one of its implementations."""

    def __init__(self, shape: Shape, state: dict[str, Tensor], dtype: torch.dtype, experts: str):
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        config = shape.config
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "num_local_experts",
            "num_experts_per_tok",
            "max_position_embeddings",
            "rms_norm_eps",
            "router_aux_loss_coef",
            "tie_word_embeddings",
        )
        theirs = MixtralConfig(
            **{name: getattr(config, name) for name in names},
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            output_router_logits=True,
            use_cache=False,
            attn_implementation="sdpa",
            experts_implementation=experts,
            sliding_window=None,
        )
        self.model = MixtralForCausalLM(theirs).to(dtype)
        self.model.load_state_dict(state)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}


class Replaced(Transformers):
    """transformers' Mixtral with another package's MoE layers in it. The balance loss is Mixtral's, from the logits
    that these layers routed by."""

    def __init__(self, shape: Shape, state: dict[str, Tensor], dtype: torch.dtype, package: str):
        super().__init__(shape, state, dtype, "eager")
        self.shape = shape
        self.model.config.output_router_logits = False
        for layer in self.model.model.layers:
            layer.mlp = LAYERS[package](shape, layer.mlp, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        loss = super().forward(ids)
        logits = tuple(layer.mlp.logits for layer in self.model.model.layers)
        balance = load_balancing_loss_func(logits, self.shape.experts, self.shape.top_k)
        return loss + self.model.config.router_aux_loss_coef * balance

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.model.named_parameters() if ".mlp." not in name}
        for number, layer in enumerate(self.model.model.layers):
            found |= {f"model.layers.{number}.mlp.{name}": grad for name, grad in layer.mlp.gradients().items()}
        return found


def contender(
    name: str, shape: Shape, state: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Module:
    """`ours`, `ours:KERNELS`, a package of `LAYERS` or `transformers:IMPLEMENTATION`, each also with `+compiled`: its
    decoder by torch.compile."""
    plain, _, how = name.partition("+")
    kind, _, variant = plain.partition(":")
    if kind == "ours":
        model = Ours(shape, state, dtype, variant or None)
    elif kind in LAYERS:
        model = Replaced(shape, state, dtype, kind)
    else:
        model = Transformers(shape, state, dtype, variant)
    if how == "compiled":
        model.model.compile()
    return model.to(device)


def contender_names(shape: Shape, memory_bytes: float = 4e9, device: str = "cpu") -> list[str]:
    """Ours (on CUDA also with liger-kernel's kernels and compiled), transformers' model with the layers of each package, and with each of
    transformers' implementations that the shape leaves room for; whether they are installed or not."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    copied = shape.tokens * shape.top_k * 3 * shape.hidden * shape.width * 4.0
    if copied > memory_bytes and _COPIES_WEIGHTS in names:
        names.remove(_COPIES_WEIGHTS)
    ours = ["ours", *(f"ours:{parts}" for parts in OUR_KERNELS if device == "cuda")]
    return [*ours, *LAYERS, *(f"transformers:{name}" for name in dict.fromkeys(names))]


def installed(name: str) -> bool:
    """Whether the package is there without which this contender cannot run."""
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None

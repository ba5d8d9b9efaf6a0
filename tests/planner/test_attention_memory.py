"""What the plan says that attention keeps for its backward pass, beside what torch keeps."""

import pytest
import torch
from support.training import config

from moe_llm.model.init import build_model
from moe_llm.planner.layout import layout_of
from moe_llm.planner.memory import KERNELS, offloaded_activations

LENGTH = 256
LATENT = {
    "num_key_value_heads": None,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}


def of(more):
    return config(2, 1, 1, model={**SIZES, **more}, data={"sequence_length": LENGTH})


def kept(cfg) -> int:
    """Bytes of the storages that the attention of one layer saves, parameters left out."""
    model = build_model(cfg.model, 0)
    attention = model.model.layers[0].self_attn
    own, seen, real = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, attention.forward

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that its place is not taken again
        return tensor

    def forward(*arguments):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return real(*arguments)

    attention.forward = forward
    ids = torch.randint(0, 24, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids)
    return sum(size for place, (_, size) in seen.items() if place not in own)


@pytest.mark.parametrize("more", [{"attention_sinks": True}, LATENT], ids=["sinks", "latent"])
def test_what_attention_keeps_beyond_plain_attention_is_within_10_percent(more):
    plain, other = of({}), of(more)
    planned = [offloaded_activations(cfg, layout_of(cfg, 1), KERNELS["cpu"]) for cfg in (other, plain)]
    assert planned[0] - planned[1] == pytest.approx(kept(other) - kept(plain), rel=0.1)

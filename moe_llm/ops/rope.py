"""Rotary position embeddings (Su et al. 2021), in the half-split convention of transformers.

Dimensions: B batch, S sequence, H query heads, G key-value heads, d head dimension.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_llm.config.rope import RopeParameters
from moe_llm.ops import liger, native
from moe_llm.ops.compiled import region

_UNSCALED = RopeParameters()


def rotary_cos_sin(
    position_ids_BS: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype = torch.float32,
    *,
    rope: RopeParameters = _UNSCALED,
    max_position_embeddings: int = 1,
    length_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * frequency, both (B, S, d), the two halves of d alike.

    Angles are formed in fp32 and the results rounded to dtype, as in transformers.

    Args:
        head_dim: of what may be turned; d is the share `rope.partial_rotary_factor` of it.
        theta: the unscaled frequencies are theta^(-2i/d).
        max_position_embeddings: trained length, where `rope` names none.
        length_BS: tokens of each one's document, which frequencies of type "dynamic" depend on.
    """
    dim = int(head_dim * rope.partial_rotary_factor)
    device = position_ids_BS.device
    if rope.rope_type == "dynamic":
        assert length_BS is not None, "dynamic frequencies follow the lengths of documents"
        frequency = _dynamic(dim, theta, rope, max_position_embeddings, length_BS)
    else:
        frequency = _frequencies(dim, theta, rope, max_position_embeddings, device)
    angle_BSd = (position_ids_BS[..., None].float() * frequency).repeat(1, 1, 2)
    cos_BSd, sin_BSd = angle_BSd.cos(), angle_BSd.sin()
    if rope.rope_type == "yarn":
        amplitude = rope.amplitude(max_position_embeddings)
        cos_BSd, sin_BSd = cos_BSd * amplitude, sin_BSd * amplitude
    return cos_BSd.to(dtype), sin_BSd.to(dtype)


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _frequencies(dim: int, theta: float, rope: RopeParameters, trained: int, device: torch.device) -> Tensor:
    """Of each pair, (d/2), the same for all documents."""
    plain = 1.0 / theta ** _exponents(dim, device)
    if rope.rope_type == "default":
        return plain
    scale, length = rope.scale(trained), rope.trained_length(trained)
    if rope.rope_type == "linear":
        return plain / scale
    if rope.rope_type == "llama3":
        assert rope.low_freq_factor is not None
        assert rope.high_freq_factor is not None
        turns = length * plain / (2 * math.pi)  # within the trained length
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * plain / scale + kept * plain

    def pair_of(turns: float) -> float:
        """The pair, counted with a fraction, that turns so often within the trained length (Peng et al. 2023)."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(rope.beta_fast or 32), pair_of(rope.beta_slow or 1)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001
    divided = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - first) / width).clamp(0, 1)
    return plain / scale * divided + plain * (1 - divided)


def _dynamic(dim: int, theta: float, rope: RopeParameters, trained: int, length_BS: Tensor) -> Tensor:
    """Of each token's pairs, (B, S, d/2): the base grows with its document beyond the trained length (NTK-aware)."""
    assert rope.factor is not None
    stretch_BS = rope.factor * length_BS.clamp(min=trained).float() / trained - (rope.factor - 1)
    theta_BS1 = (theta * stretch_BS ** (dim / (dim - 2)))[..., None]
    return 1.0 / theta_BS1 ** _exponents(dim, length_BS.device)


def document_lengths(position_ids_BS: Tensor, mask_BS: Tensor, document_BS: Tensor | None) -> Tensor:
    """Of each token the length of its document, by the last position of a real token in it, (B, S)."""
    last_BS = position_ids_BS.masked_fill(~mask_BS, 0)
    if document_BS is None:
        return (last_BS.amax(1, keepdim=True) + 1).expand_as(last_BS)
    together_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return torch.where(together_BSS, last_BS[:, None, :], 0).amax(-1) + 1


def apply_rotary(q_BHSd: Tensor, k_BGSd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions; cos and sin are constants to autograd.

    Where these are narrower than a head, its first elements are turned and the others stay. The results have the memory
    layout of their inputs, so that what is a view of (B, S, H, d) stays one.
    """
    if cos_BSd.shape[-1] == q_BHSd.shape[-1] and liger.enabled and liger.use("rope", q_BHSd, k_BGSd, cos_BSd, sin_BSd):
        return liger.rotate(q_BHSd, k_BGSd, cos_BSd, sin_BSd)
    cos_B1Sd, sin_B1Sd = cos_BSd.unsqueeze(1), sin_BSd.unsqueeze(1)
    return _turned(q_BHSd, cos_B1Sd, sin_B1Sd), _turned(k_BGSd, cos_B1Sd, sin_B1Sd)


def _turned(x_BHSd: Tensor, cos_B1Sd: Tensor, sin_B1Sd: Tensor) -> Tensor:
    width = cos_B1Sd.shape[-1]
    if width == x_BHSd.shape[-1]:
        return _Rotate.apply(x_BHSd, cos_B1Sd, sin_B1Sd)
    turned, kept = x_BHSd.transpose(1, 2).split((width, x_BHSd.shape[-1] - width), dim=-1)
    return torch.cat((_Rotate.apply(turned.transpose(1, 2), cos_B1Sd, sin_B1Sd).transpose(1, 2), kept), -1).transpose(
        1, 2
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, transposed=True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin), or the transposed rotation, without building rotate_half(x)."""
    if native.fits(x, cos, sin) and x.dim() == 4 and cos.shape[0] == x.shape[0] and cos.shape[2] == x.shape[2]:
        return _rotate_natively(x, cos.contiguous(), sin.contiguous(), transposed)
    return _rotate_by_torch(x, cos, sin, transposed)


@region
def _rotate_by_torch(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    out = x * cos
    out_first, out_second = out.chunk(2, dim=-1)
    if transposed:
        out_first.add_(second * sin_second)
        out_second.sub_(first * sin_first)
    else:
        out_first.sub_(second * sin_first)
        out_second.add_(first * sin_second)
    return out


def _rotate_natively(x_BHSd: Tensor, cos_B1Sd: Tensor, sin_B1Sd: Tensor, transposed: bool) -> Tensor:
    """The result is a view of (B, S, H, d), as what a projection gives is."""
    x_BSHd = x_BHSd.transpose(1, 2)
    batch, length, heads, width = x_BSHd.shape
    if x_BSHd.stride()[2:] != (width, 1) or x_BSHd.stride(0) != length * x_BSHd.stride(1):
        x_BSHd = x_BSHd.contiguous()
    out_BSHd = torch.empty(x_BSHd.shape, dtype=x_BSHd.dtype)
    sign, stride = -1.0 if transposed else 1.0, x_BSHd.stride(1)
    native.call(
        "rotate", x_BSHd.dtype, x_BSHd, cos_B1Sd, sin_B1Sd, out_BSHd, batch * length, heads, width, stride, sign
    )
    return out_BSHd.transpose(1, 2)

"""What is not a matrix product, each in one pass over device memory, in fp32 inside: the CUDA twins of ops/native.

Every element is written by one program and sums have a fixed order, so that results repeat to the bit.
Dimensions: N rows, F expert width, G = 2F (gate, then up), T tokens, D hidden, V vocabulary, C rows of a chunk,
M results, K summands each, R rows to choose from, B batch, S sequence, H heads, d head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_llm.ops.triton import interpreted

# columns of a row that a program holds at a time: 8 to 16 elements a thread
_BLOCK = 1024
# programs of a sum over all rows: a few for each multiprocessor
_PROGRAMS = 512


def swiglu_forward(gate_up_NG: Tensor, weight_N: Tensor | None, out_NF: Tensor) -> None:
    """out = weight * silu(gate) * up."""
    rows, width = out_NF.shape
    block = _columns(width)
    if rows:
        _swiglu_forward[rows, triton.cdiv(width, block)](gate_up_NG, weight_N, out_NF, width, block)


def swiglu_backward(
    gate_up_NG: Tensor, grad_NF: Tensor, weight_N: Tensor | None, out_NF: Tensor, grad_NG: Tensor
) -> Tensor | None:
    """From the gradient of weight * silu(gate) * up, given before the weight was multiplied to it: the product again
    into out_NF (which may be grad_NF), the gradients of gate and up into grad_NG; returns that of the weight, in
    fp32."""
    rows, width = out_NF.shape
    grad_weight_N = None if weight_N is None else torch.empty(rows, dtype=torch.float32, device=out_NF.device)
    if rows:
        _swiglu_backward[rows,](gate_up_NG, grad_NF, weight_N, out_NF, grad_NG, grad_weight_N, width, _columns(width))
    return grad_weight_N


def gather_sum(x_RD: Tensor, index_MK: Tensor, weight_MK: Tensor | None) -> Tensor:
    """out[m] = sum over k of weight[m, k] * x[index[m, k]], (M, D)."""
    (results, summands), width = index_MK.shape, x_RD.shape[1]
    out_MD, block = x_RD.new_empty(results, width), _columns(width)
    if results:
        _gather_sum[results, triton.cdiv(width, block)](
            x_RD.contiguous(),
            index_MK.contiguous(),
            None if weight_MK is None else weight_MK.contiguous(),
            out_MD,
            width,
            summands,
            block,
        )
    return out_MD


def norm_forward(
    x: Tensor, delta: Tensor | None, weight_D: Tensor, total: Tensor | None, y: Tensor, scale: Tensor, eps: float
) -> None:
    """total = x + delta (where delta is given), y = total / rms(total) * weight, scale = 1 / rms, in fp32."""
    width = x.shape[-1]
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    if rows:
        _norm_forward[rows,](x, delta, weight_D, total, y, scale, width, eps, block, num_warps=_warps(block))


def norm_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, scale: Tensor, grad_sum: Tensor | None, grad_x: Tensor
) -> Tensor:
    """grad_x = the norm's gradient (plus grad_sum, where given); returns the weight's gradient, (D,) in fp32."""
    width = x.shape[-1]
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    programs = max(1, min(rows, 3 if interpreted() else _PROGRAMS))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _norm_backward[programs,](
        grad, x, weight_D, scale, grad_sum, grad_x, partial, rows, width, block, num_warps=_warps(block)
    )
    return partial.sum(0)


def rotate(x_BHSd: Tensor, cos_B1Sd: Tensor, sin_B1Sd: Tensor, transposed: bool) -> Tensor:
    """Halves (a, b) of each head become (a cos - b sin, b cos + a sin), or the transposed of it; a view of
    (B, S, H, d)."""
    batch, heads, length, width = x_BHSd.shape
    if x_BHSd.stride(3) != 1:
        x_BHSd = x_BHSd.contiguous()
    out_BSHd = x_BHSd.new_empty(batch, length, heads, width)
    if out_BSHd.numel():
        _rotate[batch * length,](
            x_BHSd,
            cos_B1Sd,
            sin_B1Sd,
            out_BSHd,
            length,
            heads,
            width // 2,
            *x_BHSd.stride()[:3],
            transposed,
            triton.next_power_of_2(heads),
            triton.next_power_of_2(width // 2),
        )
    return out_BSHd.transpose(1, 2)


def cross_entropy_(logits_CV: Tensor, labels_C: Tensor, needs_gradient: bool) -> Tensor:
    """Each row's loss, fp32, 0 where the label is negative; with needs_gradient the logits are overwritten with the
    gradient of their sum: softmax minus one at the label, 0 where the label is negative."""
    rows, vocabulary = logits_CV.shape
    loss_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    if rows:
        block = _columns(vocabulary, 4 * _BLOCK)
        _cross_entropy[rows,](logits_CV, labels_C, loss_C, vocabulary, needs_gradient, block, num_warps=_warps(block))
    return loss_C


def _columns(width: int, most: int = _BLOCK) -> int:
    """In the interpreter a few, so that small rows have several blocks and a tail."""
    return min(triton.next_power_of_2(width), 16 if interpreted() else most)


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


@triton.jit
def _swiglu_forward(gate_up_ptr, weight_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = columns < width
    gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=own, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=own, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + row).to(tl.float32)
    tl.store(out_ptr + row * width + columns, h.to(out_ptr.dtype.element_ty), mask=own)


@triton.jit
def _swiglu_backward(
    gate_up_ptr, grad_ptr, weight_ptr, out_ptr, grad_gate_up_ptr, grad_weight_ptr, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    kind = out_ptr.dtype.element_ty
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row).to(tl.float32)
    dots = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        own = columns < width
        gate_offsets = row * 2 * width + columns
        gate = tl.load(gate_up_ptr + gate_offsets, mask=own, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + gate_offsets + width, mask=own, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + columns, mask=own, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        h = silu * up
        dots += grad * h
        grad *= weight
        tl.store(out_ptr + row * width + columns, (h * weight).to(kind), mask=own)
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_gate_up_ptr + gate_offsets, grad_gate.to(kind), mask=own)
        tl.store(grad_gate_up_ptr + gate_offsets + width, (grad * silu).to(kind), mask=own)
    if weight_ptr is not None:
        tl.store(grad_weight_ptr + row, tl.sum(dots, 0))


@triton.jit
def _gather_sum(x_ptr, index_ptr, weight_ptr, out_ptr, width, SUMMANDS: tl.constexpr, BLOCK: tl.constexpr):
    result = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(SUMMANDS):
        row = tl.load(index_ptr + result * SUMMANDS + k).to(tl.int64)
        x = tl.load(x_ptr + row * width + columns, mask=own, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            x *= tl.load(weight_ptr + result * SUMMANDS + k).to(tl.float32)
        total += x
    tl.store(out_ptr + result * width + columns, total.to(out_ptr.dtype.element_ty), mask=own)


@triton.jit
def _norm_forward(x_ptr, delta_ptr, weight_ptr, total_ptr, y_ptr, scale_ptr, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    own = columns < width
    kind = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * width + columns, mask=own, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x += tl.load(delta_ptr + row * width + columns, mask=own, other=0.0).to(tl.float32)
        tl.store(total_ptr + row * width + columns, x.to(kind), mask=own)
        x = x.to(kind).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + columns, mask=own, other=0.0).to(tl.float32)
    # rounded before the weight, as transformers does it
    normed = (x * scale).to(kind).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (normed * weight).to(kind), mask=own)


@triton.jit
def _norm_backward(
    grad_ptr, x_ptr, weight_ptr, scale_ptr, grad_sum_ptr, grad_x_ptr, partial_ptr, rows, width, BLOCK: tl.constexpr
):
    columns = tl.arange(0, BLOCK)
    own = columns < width
    weight = tl.load(weight_ptr + columns, mask=own, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offsets = tl.cast(row, tl.int64) * width + columns
        x = tl.load(x_ptr + offsets, mask=own, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=own, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normed = x * scale
        grad_weight += grad * normed
        g = grad * weight
        grad_x = scale * (g - normed * (tl.sum(g * normed, 0) / width))
        if grad_sum_ptr is not None:
            grad_x += tl.load(grad_sum_ptr + offsets, mask=own, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=own)
    tl.store(partial_ptr + tl.program_id(0) * width + columns, grad_weight, mask=own)


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, length, heads, half, stride_b, stride_h, stride_s,
    TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    own = (head < heads) & (column < half)
    x_ptrs = x_ptr + token // length * stride_b + token % length * stride_s + head * stride_h + column
    first = tl.load(x_ptrs, mask=own, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + half, mask=own, other=0.0).to(tl.float32)
    angles = token * 2 * half + column
    cos_first = tl.load(cos_ptr + angles, mask=column < half, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + angles + half, mask=column < half, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + angles, mask=column < half, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + angles + half, mask=column < half, other=0.0).to(tl.float32)
    if TRANSPOSED:  # each sine goes with the half that it is read from
        sin_first, sin_second = -sin_second, -sin_first
    kind = out_ptr.dtype.element_ty
    out_ptrs = out_ptr + (token * heads + head) * 2 * half + column
    tl.store(out_ptrs, (first * cos_first - second * sin_first).to(kind), mask=own)
    tl.store(out_ptrs + half, (second * cos_second + first * sin_second).to(kind), mask=own)


@triton.jit
def _cross_entropy(logits_ptr, labels_ptr, loss_ptr, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocabulary
    kind = logits_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row)
    # before anything is overwritten: the reductions below keep the program's threads in step
    chosen = tl.load(row_ptr + tl.maximum(label, 0)).to(tl.float32)
    if label < 0:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(row_ptr + columns, tl.zeros((BLOCK,), kind), mask=columns < vocabulary)
        return
    # the largest logit and the sum of exponentials below it, column by column of a block and in one pass
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # where no logit was above -inf yet, both exponents would be of inf - inf
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    highest = tl.max(top, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(loss_ptr + row, log_sum - chosen)
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            own = columns < vocabulary
            x = tl.load(row_ptr + columns, mask=own, other=-float("inf")).to(tl.float32)
            grad = tl.exp(x - log_sum) - tl.where(columns == label, 1.0, 0.0)
            tl.store(row_ptr + columns, grad.to(kind), mask=own)

"""What test_liger.py runs under TRITON_INTERPRET=1: prints the name of each operation whose kernel equals its reference."""

import liger_kernel.ops.rms_norm as liger_norm
import torch
import triton.language as tl
from triton.runtime import interpreter

from moe_llm.model.layers import SwiGLU
from moe_llm.ops import kernels, native
from moe_llm.ops.cross_entropy import linear_cross_entropy
from moe_llm.ops.norm import add_rms_norm, rms_norm
from moe_llm.ops.rope import apply_rotary, rotary_cos_sin

liger_norm.rsqrt = lambda x: tl.rsqrt(x)  # the CUDA library's, which the interpreter has not


class Scalar(float):
    """A number as kernels see it on a device; the interpreter hands them Python's own."""

    def to(self, dtype):
        return float(self)


_convert = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda arg: Scalar(arg) if isinstance(arg, float) else _convert(arg)
native.fits = lambda *_: False


def with_gradients(operation, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = operation(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o.float() * torch.arange(o.numel()).view_as(o).cos()).sum() for o in out)
    return [*out, *torch.autograd.grad(total, leaves)]


def compare(name, operation, *leaves, tolerance):
    kernels.choose("liger", False, torch.device("cpu"))
    found = with_gradients(operation, *leaves)
    kernels.choose("torch", False, torch.device("cpu"))
    expected = with_gradients(operation, *leaves)
    for a, b in zip(found, expected, strict=True):
        worst = ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        assert worst < tolerance, f"{name} differs by {worst}"
    print(name)


# the interpreter computes bf16 on its bits as if they were numbers: fp32 alone
for dtype, tolerance in ((torch.float32, 2e-6),):
    torch.manual_seed(0)
    x, delta, weight = (torch.randn(shape).to(dtype) for shape in ((2, 5, 48), (2, 5, 48), (48,)))
    compare("norm", lambda x, w: rms_norm(x, w, 1e-5), x, weight, tolerance=tolerance)
    compare("add_norm", lambda x, d, w: add_rms_norm(x, d, w, 1e-5), x, delta, weight, tolerance=tolerance)
    # as projections give them: views of (B, S, H, d)
    q, k = (torch.randn(2, 7, heads, 16).to(dtype) for heads in (4, 2))
    cos, sin = rotary_cos_sin(torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]), 16, 1e4, dtype)

    def rotary(q, k, cos=cos, sin=sin):
        return apply_rotary(q.transpose(1, 2) * 1, k.transpose(1, 2) * 1, cos, sin)

    compare("rope", rotary, q, k, tolerance=tolerance)
    shared = SwiGLU(40, 24).to(dtype)
    compare("swiglu", shared, torch.randn(9, 40).to(dtype), tolerance=tolerance)
    labels = torch.randint(0, 50, (21,))
    labels[::3] = -100
    hidden, head = torch.randn(21, 32).to(dtype), torch.randn(50, 32).to(dtype)
    compare("loss", lambda h, w, y=labels: linear_cross_entropy(h, w, y)[0], hidden, head, tolerance=tolerance)

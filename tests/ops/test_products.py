"""Products equal torch's in every layout, whichever library computes them, and each library is used where it should."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from moe_llm.ops import native, products


@pytest.fixture
def ours(monkeypatch):
    """Products go to our kernel, on any processor that it is for, and how many did is counted."""
    monkeypatch.setenv("MOE_LLM_PRODUCTS", "1")
    products._ours.cache_clear()
    calls, plain = [], native.matmul
    monkeypatch.setattr(native, "matmul", lambda *a, **k: (calls.append(a[2].shape), plain(*a, **k))[1])
    if not products._ours():
        pytest.skip("a processor without AVX-512, or no kernels")
    yield calls
    products._ours.cache_clear()


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    return (actual.double() - expected.double()).abs().max() <= 5e-6 * expected.abs().max()


def laid_out(matrix, how):
    """The same numbers in another layout."""
    if how == "transposed":
        return matrix.mT.contiguous().mT
    if how == "columns of a wider one":
        return F.pad(matrix, (3, 5))[..., 3:-5]
    return matrix


LAYOUTS = ["plain", "transposed", "columns of a wider one"]


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("shape", [(129, 300, 67), (1, 1024, 1031), (700, 16, 256), (64, 4096, 8)])
def test_product_of_two_matrices(ours, shape, left, right):
    rows, inner, columns = shape
    a, b = seeded(rows, inner), seeded(inner, columns, seed=1)
    expected = a.double() @ b.double()
    a, b = laid_out(a, left), laid_out(b, right)
    assert close(products.mm(a, b), expected)
    out = torch.full((rows, columns), torch.nan)  # what is there does not enter
    assert products.mm(a, b, out=out) is out
    assert close(out, expected)
    products.mm(a, b, out=out, add=True)
    assert close(out, 2 * expected)
    assert len(ours) == 3


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_batched_product(ours, left, right):
    a, b = seeded(3, 100, 64), seeded(3, 64, 75, seed=1)
    expected = torch.bmm(a.double(), b.double())
    a, b = laid_out(a, left), laid_out(b, right)
    out = torch.full((3, 100, 75), torch.nan)
    assert products.bmm(a, b, out=out) is out
    assert close(out, expected)
    assert close(products.bmm(a, b), expected)
    assert len(ours) == 2


def test_linear_map_and_its_gradients(ours):
    x, weight = seeded(5, 130, 96).requires_grad_(), seeded(200, 96, seed=1).requires_grad_()
    y = products.linear(x, weight)
    expected = F.linear(x, weight)
    assert y.shape == expected.shape
    assert close(y, expected)
    direction = seeded(5, 130, 200, seed=2)
    for grad, other in zip(*(torch.autograd.grad(z, (x, weight), direction) for z in (y, expected)), strict=True):
        assert grad.shape == other.shape
        assert close(grad, other)
    assert len(ours) == 3


def test_frozen_sides_get_no_gradient(ours):
    x, weight = seeded(200, 96), seeded(200, 96, seed=1).requires_grad_()
    products.linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert len(ours) == 2  # not that of x
    x, weight = x.requires_grad_(), weight.detach()
    products.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert len(ours) == 4


def test_autocast_is_torch_s(ours):
    x, weight = seeded(200, 96), seeded(200, 96, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert not ours


@pytest.mark.parametrize("shape", [(0, 512), (3, 20)])
def test_small_and_empty_products_are_torch_s(ours, shape):
    a, b = seeded(*shape), seeded(shape[1], 512)
    assert torch.equal(products.mm(a, b), a @ b)
    assert torch.equal(products.linear(a, b.t().contiguous()), F.linear(a, b.t().contiguous()))
    assert not ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torch_s(ours, dtype):
    a, b = seeded(200, 200).to(dtype), seeded(200, 200, seed=1).to(dtype)
    assert torch.equal(products.mm(a, b), a @ b)
    assert torch.equal(products.bmm(a[None], b[None]), (a @ b)[None])
    assert not ours


def test_the_profiler_sees_them(ours):
    a = seeded(200, 200)
    with native.recorded(), torch.profiler.profile() as profile:
        out = products.mm(a, a)
        products.mm(a, a, out=out, add=True)
        products.bmm(a[None], a[None])
        products.linear(a, a)
    assert [event.count for event in profile.key_averages() if event.key == "moe_llm::matmul"] == [4]
    assert close(out, 2 * (a.double() @ a.double()))


def test_shapes_that_do_not_fit_are_an_error(ours):
    with pytest.raises(RuntimeError, match=r"\(200, 200\) x \(200, 200\) does not fit into \(7, 7\)"):
        products.mm(seeded(200, 200), seeded(200, 200), out=torch.empty(7, 7))
    with pytest.raises(RuntimeError, match="does not fit"):
        products.mm(seeded(200, 200), seeded(300, 200))


def test_a_row_s_product_does_not_depend_on_the_others(ours):
    """To the bit: nor on how many threads there are."""
    a, b = seeded(300, 1100), seeded(1100, 70, seed=1)
    y, gradient = products.mm(a, b), products.mm(b[:300].t(), a)
    assert torch.equal(products.mm(a[37:200].clone(), b), y[37:200])
    threads = torch.get_num_threads()
    try:
        for other in (1, 3, 5):
            torch.set_num_threads(other)
            assert torch.equal(products.mm(a, b), y)
            assert torch.equal(products.mm(b[:300].t(), a), gradient)
    finally:
        torch.set_num_threads(threads)


def test_two_threads_of_python_at_once(ours):
    """Each has buffers of its own."""
    pairs = [(seeded(400, 600, seed=i), seeded(400, 500, seed=9 + i)) for i in range(4)]
    expected = [products.mm(a.t(), b) for a, b in pairs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda pair: products.mm(pair[0].t(), pair[1]), pairs))
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("vendor", "setting", "expected"),
    [
        ("AuthenticAMD", None, True),
        ("GenuineIntel", None, False),
        ("GenuineIntel", "1", True),
        ("AuthenticAMD", "0", False),
        ("", None, False),
    ],
)
def test_who_computes(ours, monkeypatch, vendor, setting, expected):
    monkeypatch.setattr(native, "vendor", lambda: vendor)
    monkeypatch.delenv("MOE_LLM_PRODUCTS")
    if setting is not None:
        monkeypatch.setenv("MOE_LLM_PRODUCTS", setting)
    products._ours.cache_clear()
    assert products.fits(torch.empty(1)) == expected


@pytest.mark.parametrize("variable", ["MOE_LLM_PRODUCTS", "MOE_LLM_NATIVE"])
def test_switched_off_from_outside(variable):
    program = "import torch; from moe_llm.ops import products; print(products.fits(torch.empty(1)))"
    environment = {**os.environ, variable: "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


@pytest.mark.parametrize(
    ("can", "setting", "expected"),
    [
        ("avx512_bf16", None, True),
        ("avx512_bf16 amx_bf16", None, False),
        ("avx512_bf16 amx_bf16", "1", True),
        ("avx512_bf16", "0", False),
        ("avx512f", "1", False),
        ("", None, False),
    ],
)
def test_who_computes_experts_in_bf16(monkeypatch, can, setting, expected):
    monkeypatch.setattr(native, "_cpuinfo", lambda: ["vendor_id\t: AuthenticAMD", f"flags\t\t: fpu {can}"])
    monkeypatch.delenv("MOE_LLM_PRODUCTS", raising=False)
    if setting is not None:
        monkeypatch.setenv("MOE_LLM_PRODUCTS", setting)
    products._ours_in_bf16.cache_clear()
    try:
        x = torch.empty(1, 24, dtype=torch.bfloat16)
        assert products.fused_experts_fit(x, 40) == (expected and native.fits(x))
        assert not products.fits(x)
    finally:
        products._ours_in_bf16.cache_clear()

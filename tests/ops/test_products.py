"""Products equal torch's in every layout, whichever library computes them, and each library is used where it should."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from moe_llm.ops import expert_mlp_fused, native, products
from moe_llm.ops.expert_mlp import expert_mlp
from moe_llm.ops.expert_mlp_adapted import ExpertAdapters, Factors, adapted_expert_mlp
from moe_llm.ops.shapes import round_up


@pytest.fixture
def onednn(monkeypatch):
    """Products go to oneDNN, on any processor that it takes, and how many did is counted."""
    monkeypatch.setenv("MOE_LLM_ONEDNN", "1")
    products._onednn.cache_clear()
    calls, plain = [], native.product
    monkeypatch.setattr(native, "product", lambda *a, **k: (calls.append(a[1].shape), plain(*a, **k))[1])
    if products._onednn() is None:
        pytest.skip("a processor without AVX-512")
    yield calls
    products._onednn.cache_clear()


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
def test_product_of_two_matrices(onednn, shape, left, right):
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
    assert len(onednn) == 3


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_batched_product(onednn, left, right):
    a, b = seeded(3, 100, 64), seeded(3, 64, 75, seed=1)
    expected = torch.bmm(a.double(), b.double())
    a, b = laid_out(a, left), laid_out(b, right)
    out = torch.full((3, 100, 75), torch.nan)
    assert products.bmm(a, b, out=out) is out
    assert close(out, expected)
    assert close(products.bmm(a, b), expected)
    assert len(onednn) == 2


def test_linear_map_and_its_gradients(onednn):
    x, weight = seeded(5, 130, 96).requires_grad_(), seeded(200, 96, seed=1).requires_grad_()
    y = products.linear(x, weight)
    expected = F.linear(x, weight)
    assert y.shape == expected.shape
    assert close(y, expected)
    direction = seeded(5, 130, 200, seed=2)
    for grad, other in zip(*(torch.autograd.grad(z, (x, weight), direction) for z in (y, expected)), strict=True):
        assert grad.shape == other.shape
        assert close(grad, other)
    assert len(onednn) == 3


def test_frozen_sides_get_no_gradient(onednn):
    x, weight = seeded(200, 96), seeded(200, 96, seed=1).requires_grad_()
    products.linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert len(onednn) == 2  # not that of x
    x, weight = x.requires_grad_(), weight.detach()
    products.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert len(onednn) == 4


def test_autocast_is_torch_s(onednn):
    x, weight = seeded(200, 96), seeded(200, 96, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert not onednn


@pytest.mark.parametrize("shape", [(0, 512), (3, 20)])
def test_small_and_empty_products_are_torch_s(onednn, shape):
    a, b = seeded(*shape), seeded(shape[1], 512)
    assert torch.equal(products.mm(a, b), a @ b)
    assert torch.equal(products.linear(a, b.t().contiguous()), F.linear(a, b.t().contiguous()))
    assert not onednn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torch_s(onednn, dtype):
    a, b = seeded(200, 200).to(dtype), seeded(200, 200, seed=1).to(dtype)
    assert torch.equal(products.mm(a, b), a @ b)
    assert torch.equal(products.bmm(a[None], b[None]), (a @ b)[None])
    assert not onednn


def test_the_profiler_sees_them(onednn):
    a = seeded(200, 200)
    with native.recorded(), torch.profiler.profile() as profile:
        out = products.mm(a, a)
        products.mm(a, a, out=out, add=True)
        products.bmm(a[None], a[None])
        products.linear(a, a)
    assert [event.count for event in profile.key_averages() if event.key == "moe_llm::product"] == [4]
    assert close(out, 2 * (a.double() @ a.double()))


def test_what_torch_throws_arrives_as_an_error(onednn):
    with pytest.raises(RuntimeError, match="matmul"):
        products.mm(seeded(200, 200), seeded(200, 200), out=torch.empty(7, 7))


@pytest.fixture(params=[64, 128, 1024])
def tiles(onednn, monkeypatch, request):
    """Tiles of two sizes and odd rests, in blocks of one, of some, and of all of an expert's."""
    monkeypatch.setattr(products, "_LEAST_WORK", 2**12)
    monkeypatch.setattr(products, "_TILE_ROWS", (64, 32))
    monkeypatch.setattr(expert_mlp_fused, "_BLOCK_ROWS", request.param)
    return onednn


def drawn_experts(hidden=24, width=40):
    """An expert without rows, and rows that belong to nobody."""
    counts, total = torch.tensor([200, 0, 64, 1, 37]), 310
    weights = 0.2 * seeded(5, 2 * width, hidden, seed=1), 0.2 * seeded(5, hidden, width, seed=2)
    return seeded(total, hidden), *weights, counts, seeded(total, seed=3), seeded(total, hidden, seed=4)


def check_gradients(outputs, leaves, direction):
    results = [(y, *torch.autograd.grad(y, leaves, direction)) for y in outputs]
    for actual, expected in zip(*results, strict=True):
        assert actual.isfinite().all()
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("weighted", [True, False])
def test_experts_whose_rows_are_cut_into_tiles(tiles, weighted):
    x, gate_up, down, counts, weight, direction = drawn_experts()
    weight = weight if weighted else None
    leaves = [leaf.requires_grad_() for leaf in (x, gate_up, down, weight) if leaf is not None]
    outputs = [
        expert_mlp(x, gate_up, down, counts, backend=backend, weight_N=weight) for backend in ("fused", "loop")
    ]
    check_gradients(outputs, leaves, direction)
    assert len(tiles) > 30


def test_adapted_experts_whose_rows_are_cut_into_tiles(tiles):
    x, gate_up, down, counts, weight, direction = drawn_experts()
    shapes = (5, 6, 24), (5, 80, 6), (5, 6, 40), (5, 24, 6)
    factors = [(0.2 * seeded(*shape, seed=5 + i)).requires_grad_() for i, shape in enumerate(shapes)]
    adapters = ExpertAdapters(Factors(*factors[:2]), Factors(*factors[2:]), 1.5)
    leaves = [x.requires_grad_(), weight.requires_grad_(), *factors]
    outputs = [
        adapted_expert_mlp(x, gate_up, down, counts, adapters, weight, backend=backend)
        for backend in ("fused", "loop")
    ]
    check_gradients(outputs, leaves, direction)
    assert len(tiles) > 30


def test_sums_over_tiles_add_where_they_must(onednn, monkeypatch):
    """A rest is compiled once only: it adds to nothing."""
    monkeypatch.setattr(products, "_LEAST_WORK", 2**12)
    added = []
    plain = products.mm
    monkeypatch.setattr(products, "mm", lambda *a, **k: (added.append((len(a[1]), k["add"])), plain(*a, **k)))
    a, b, out = seeded(144, 30), seeded(144, 50, seed=1), torch.full((30, 50), torch.nan)
    rows = [slice(0, 64), slice(64, 128), slice(128, 144)]
    products.mm_over_tiles(rows, a, b, out)
    assert close(out, a.double().t() @ b.double())
    assert added == [(16, False), (64, True), (64, True)]
    products.mm_over_tiles(rows, a, b, out, add=True)
    assert close(out, 2 * (a.double().t() @ b.double()))


def test_tiles_come_in_few_shapes(onednn):
    x = torch.empty(1, 512)
    shapes = set()
    for count in range(1, 3000):
        tiles = list(products.row_tiles(x, count, 3584))
        assert sum(rows for rows, _ in tiles) == count
        assert all(rows <= computed < rows + 32 for rows, computed in tiles)
        assert all(rows == computed for rows, computed in tiles[:-1])
        shapes |= {computed for _, computed in tiles}
    assert len(shapes) <= 18
    assert list(products.row_tiles(x, 77, 2)) == [(77, 77)]  # small: torch's, which are not compiled
    assert list(products.row_tiles(x.bfloat16(), 1000, 3584)) == [(1000, round_up(1000))]
    assert list(products.row_tiles(x.double(), 1000, 3584)) == [(1000, 1000)]


@pytest.mark.skipif(
    native.vendor() != "AuthenticAMD" or torch.backends.cpu.get_cpu_capability() != "AVX512"
    or os.environ.get("MOE_LLM_NATIVE") == "0" or os.environ.get("MOE_LLM_ONEDNN") == "0",
    reason="not a processor on which oneDNN is the faster",
)
def test_the_function_is_found():
    """A torch in which it is called otherwise would be slower without a word."""
    assert products.fits(torch.empty(1))


@pytest.mark.parametrize(("vendor", "setting", "expected"), [
    ("AuthenticAMD", None, True), ("GenuineIntel", None, False), ("GenuineIntel", "1", True),
    ("AuthenticAMD", "0", False), ("", None, False),
])
def test_who_computes(onednn, monkeypatch, vendor, setting, expected):
    monkeypatch.setattr(native, "vendor", lambda: vendor)
    monkeypatch.delenv("MOE_LLM_ONEDNN")
    if setting is not None:
        monkeypatch.setenv("MOE_LLM_ONEDNN", setting)
    products._onednn.cache_clear()
    assert products.fits(torch.empty(1)) == expected


def test_a_torch_without_that_function(onednn, monkeypatch):
    monkeypatch.setattr(products, "_SYMBOL", "_ZN2at6native9no_suchEv")
    products._onednn.cache_clear()
    assert not products.fits(torch.empty(1))
    a = seeded(200, 200)
    assert torch.equal(products.mm(a, a), a @ a)


@pytest.mark.parametrize("variable", ["MOE_LLM_ONEDNN", "MOE_LLM_NATIVE"])
def test_switched_off_from_outside(variable):
    program = "import torch; from moe_llm.ops import products; print(products.fits(torch.empty(1)))"
    environment = {**os.environ, variable: "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr

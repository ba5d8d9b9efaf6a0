import ctypes

import pytest
import torch

from moe_llm.ops import native


@pytest.fixture(params=["native", "x86-64", "x86-64-v3", "x86-64-v4"])
def processor(request, monkeypatch):
    """Kernels as they are compiled for processors with narrower vectors and fewer instructions than this one has."""
    level = request.param
    if not native.fits(torch.zeros(1)):
        pytest.skip("no kernels here")
    if level != "native":
        flags = next((line.split() for line in native._cpuinfo() if line.startswith("flags")), [])
        needed = {"x86-64": {"sse2"}, "x86-64-v3": {"avx2", "fma"}, "x86-64-v4": {"avx512bw", "avx512dq", "avx512vl"}}
        if not needed[level].issubset(flags):
            pytest.skip(f"no processor of {level}")
        built = native.build(flags=tuple(f"-march={level}" if f == "-march=native" else f for f in native._FLAGS))
        library = ctypes.CDLL(str(built))
        monkeypatch.setattr(native, "_library", lambda: library)
    native._function.cache_clear()
    yield level
    native._function.cache_clear()

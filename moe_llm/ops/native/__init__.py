"""Elementwise kernels for the CPU in C++, compiled on the machine that runs them, at their first use.

torch's own elementwise operations take a pass over memory each, and in bf16 a slow one; together they took more than
half of a bf16 training step on a CPU. Each kernel here does with one pass what several of them do. Where no compiler
is found every operation falls back to torch's, and the first says so once; with `MOE_LLM_NATIVE=0` all do, silently.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",  # pairs of bf16 are read as cells of 32 bits
    "-ffp-contract=off",  # results equal torch's to the bit where the order of operations is the same
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),  # 0.75 of the time of 256
    "-fopenmp",
    "-shared",
    "-fPIC",
)
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# p pointer, q int64, f float, i int; the last int of each is the number of threads and is filled in by `call`
_SIGNATURES = {
    "norm_forward": "ppppppqqfi",
    "norm_backward": "pppppppqqqi",
    "swiglu_forward": "pppqqi",
    "swiglu_backward": "ppppppqqi",
    "cross_entropy": "pppqqii",
    "probabilities": "pppqqqqqqqqfii",
    "softmax_backward": "ppqqfi",
    "gather_sum": "ppppqqqi",
    "rotate": "ppppqqqqfi",
    "matmul": "ppppi",
    "experts_forward": "pppppppppqqqqi",
    "experts_backward": "ppppppppppppppqqqqi",
}
_C_TYPES: dict[str, type] = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}


def fits(first: Tensor, *tensors: Tensor | None) -> bool:
    """Whether these can go to a kernel: on the CPU, all of one dtype, fp32 or bf16, and the library is there."""
    return (
        first.dtype in _DTYPES
        and first.device.type == "cpu"
        and all(t is None or t.dtype == first.dtype for t in tensors)
        and _library() is not None
    )


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Run a kernel for `dtype` on torch's number of threads. Tensors must be contiguous, unless a stride is passed,
    and stay referenced by the caller; None is a null pointer."""
    function = _function(name, dtype)
    function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments], torch.get_num_threads())


def matmul(
    a: Tensor, b: Tensor, out: Tensor, *, transpose_a: bool = False, transpose_b: bool = False, add: bool = False
) -> None:
    """out = a b, or added to it, summed in fp32; a or b are given transposed where it says so, not both.

    Args:
        a, b, out: (rows, columns), (batch, rows, columns), (outer, inner, rows, columns), or, for a (and b where a is
            given transposed, and out where it is not), (outer, inner, runs, rows, columns), which stands for
            runs * rows rows. Columns are contiguous, all else has any stride. In bf16 what is summed over is even,
            unless a is given transposed.
    """
    outer, inner = (1, 1, *a.shape[:-2])[-2:] if a.dim() < 5 else a.shape[:2]
    rows = a.shape[2] * a.shape[3] if a.dim() == 5 else a.shape[-2]
    M, K = (a.shape[-1], rows) if transpose_a else (rows, a.shape[-1])
    layout = (ctypes.c_int64 * 23)(
        outer, inner, M, out.shape[-1], K, *_steps(a), *_steps(b), *_steps(out), transpose_a, transpose_b, add
    )
    _function("matmul", a.dtype)(a.data_ptr(), b.data_ptr(), out.data_ptr(), layout, torch.get_num_threads())


def _steps(x: Tensor) -> tuple[int, ...]:
    """Of the outer and the inner batch, of runs and of rows; and the rows of a run, 0 for all."""
    strides = x.stride()[:-1]
    return (*strides, x.shape[3]) if len(strides) == 4 else (*(0, 0, *strides[:-1])[-2:], 0, strides[-1], 0)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Meanwhile torch's profiler sees each kernel, under its name."""
    global call, matmul
    plain, plain_matmul = call, matmul
    recorder = torch.profiler.record_function

    def call_recorded(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
        with recorder(f"moe_llm::{name}"):
            plain(name, dtype, *arguments)

    def matmul_recorded(a: Tensor, b: Tensor, out: Tensor, **how: bool) -> None:
        with recorder("moe_llm::matmul"):
            plain_matmul(a, b, out, **how)

    call, matmul = call_recorded, matmul_recorded
    try:
        yield
    finally:
        call, matmul = plain, plain_matmul


@functools.cache
def _function(name: str, dtype: torch.dtype):
    library = _library()
    assert library is not None, "ask `fits` first"
    function = library[f"{name}_{_DTYPES[dtype]}"]
    function.argtypes = [_C_TYPES[kind] for kind in _SIGNATURES[name]]
    function.restype = None
    return function


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("MOE_LLM_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(build()))
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"the CPU kernels are not used, and training is slower for it: {_reason(error)}", stacklevel=2)
        return None


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    """Why there is no library, and what to do."""
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or "").strip().splitlines()
        first = next((line for line in said if "error" in line), said[-1] if said else f"exit code {error.returncode}")
        return f"{' '.join(_compiler())} could not compile them ({first}): name another compiler in CXX"
    if isinstance(error, FileNotFoundError) and error.filename == _compiler()[0]:
        return f"there is no compiler {error.filename!r}: install g++, or name a compiler in CXX"
    return f"{error}: set XDG_CACHE_HOME to a directory that can be written"


def _compiler() -> list[str]:
    """CXX may be a command with arguments, such as `ccache g++`."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _cache_root() -> Path:
    """Where compiled libraries are kept: the user's cache directory, or, for a user without a home or with one that cannot
    be written, a directory of that user's own among the temporary ones."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        candidates = [Path(given) if given else Path.home() / ".cache"]
    except RuntimeError:  # no HOME, and a uid that no one knows
        candidates = []
    user = os.getuid() if hasattr(os, "getuid") else None
    temporary = Path(tempfile.gettempdir()) / f"moe_llm-{'cache' if user is None else user}"
    failure: OSError | None = None
    for candidate in [*candidates, temporary]:
        root = candidate / "moe_llm" / "native"
        try:
            if candidate == temporary:
                temporary.mkdir(mode=0o700, exist_ok=True)
                if user is not None and temporary.stat().st_uid != user:  # what is loaded from there would be theirs
                    raise PermissionError(errno.EACCES, "belongs to another user", str(temporary))
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK) and not any(root.glob("*.so")):
                raise PermissionError(errno.EACCES, "cannot be written", str(root))
        except OSError as error:
            failure = failure or error
        else:
            return root
    assert failure is not None
    raise failure


def build(source: Path = _SOURCE, flags: tuple[str, ...] = _FLAGS) -> Path:
    """The compiled library, from the cache where it is there and whole: named by source, headers, flags, compiler,
    processor.

    A file that is cut short would end the process when it is loaded (SIGBUS): its size and hash stand beside it, and one
    that differs is compiled again.
    """
    compiler = _compiler()
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = "\n".join([*texts, *flags, *compiler, _processor()])
    root = _cache_root()
    library = root / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not _is_whole(library):
        # under a name of its own first: ranks may build at the same time, and each then puts the same file there
        with tempfile.TemporaryDirectory(dir=root) as folder:
            built = Path(folder) / library.name
            subprocess.run(
                [*compiler, str(source), *flags, "-o", str(built)], check=True, capture_output=True, text=True
            )
            checksum = built.with_suffix(".sha256")
            checksum.write_text(_checksum(built), encoding="ascii")
            os.replace(built, library)
            os.replace(checksum, library.with_suffix(".sha256"))
    return library


def _is_whole(library: Path) -> bool:
    """Whether a cached library is what the compiler wrote."""
    try:
        return library.with_suffix(".sha256").read_text(encoding="ascii") == _checksum(library)
    except (OSError, UnicodeDecodeError):
        return False


def _checksum(library: Path) -> str:
    return f"{library.stat().st_size} {hashlib.sha256(library.read_bytes()).hexdigest()}"


def instructions() -> set[str]:
    """What the processor can do, in the words of Linux; empty where that is not known."""
    return next((set(line.partition(":")[2].split()) for line in _cpuinfo() if line.startswith("flags")), set())


def vendor() -> str:
    """Who made the processor, in the processor's own words; empty where that is not known."""
    found = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("vendor_id")]
    return found[0] if found else ""


def _processor() -> str:
    """What -march=native depends on."""
    lines = [line for line in _cpuinfo() if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(dict.fromkeys(lines)) or f"{platform.machine()} {platform.processor()}"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return []


def graph_is_kept() -> bool:
    """Whether the running backward pass may be run again (`retain_graph`), and what was saved must stay as it is. To be
    called within one."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # not in torch's interface
    return asked is None or asked()

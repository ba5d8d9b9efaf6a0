"""Streaming safetensors: what we write the library reads, what it writes we read, and damage is named."""

import hashlib
import json
import subprocess
import sys
import tracemalloc
from itertools import pairwise

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_llm.checkpoint.safetensors_io import (
    ShardWriter,
    Spec,
    TensorFiles,
    shard_name,
    split_shards,
)
from moe_llm.config.base import parse_size
from moe_llm.errors import UserError

TENSORS = {
    "matrix": torch.randn(5, 3),
    "half": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "whole": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "flags": torch.tensor([True, False]),
}


def write(path, tensors):
    writer = ShardWriter(path, [Spec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()])
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer.close()


def test_the_library_reads_what_is_written(tmp_path):
    record = write(tmp_path / "model.safetensors", TENSORS)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    data = (tmp_path / "model.safetensors").read_bytes()
    assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = TensorFiles(tmp_path)
    assert set(files.names()) == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (files.shape(name), files.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(files.read(name), tensor)
    assert torch.equal(files.read("matrix", slice(1, 4)), TENSORS["matrix"][1:4])
    assert torch.equal(files.read("matrix", slice(5, 9)), TENSORS["matrix"][5:9])


def test_views_are_written_as_they_read_and_cast(tmp_path):
    x = torch.randn(6, 4)
    writer = ShardWriter(tmp_path / "model.safetensors", [Spec("t", (4, 6), torch.bfloat16)])
    writer.write("t", x.T)
    writer.close()
    assert torch.equal(TensorFiles(tmp_path).read("t"), x.T.bfloat16())


def test_a_writer_insists_on_its_plan(tmp_path):
    specs = [Spec("a", (2,), torch.float32), Spec("b", (2,), torch.float32)]
    writer = ShardWriter(tmp_path / "model.safetensors", specs)
    with pytest.raises(AssertionError, match="is due"):
        writer.write("b", torch.zeros(2))
    with pytest.raises(AssertionError, match="is due"):
        writer.write("a", torch.zeros(3))
    writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="lacks 1"):
        writer.close()
    writer.abort()
    with pytest.raises(AssertionError, match="occurs twice"):
        ShardWriter(tmp_path / "again.safetensors", [specs[0], specs[0]])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=20), st.integers(1, 30))
def test_shards_keep_order_and_size(widths, limit):
    specs = [Spec(f"t{i}", (width,), torch.uint8) for i, width in enumerate(widths)]
    shards = split_shards(specs, limit)
    assert [spec for shard in shards for spec in shard] == specs
    assert all(len(shard) == 1 or sum(spec.nbytes for spec in shard) <= limit for shard in shards)
    assert all(shards)
    for before, after in pairwise(shards):  # none could have begun earlier
        assert sum(spec.nbytes for spec in before) + after[0].nbytes > limit


def test_sizes_and_names():
    assert [parse_size(text) for text in ("5GB", "1.5KB", "200MB")] == [5 * 10**9, 1500, 2 * 10**8]
    assert shard_name("model", 0, 1) == "model.safetensors"
    assert shard_name("model", 1, 12) == "model-00002-of-00012.safetensors"
    for wrong in ("5", "GB", "0GB", "5GiB", "-1GB"):
        with pytest.raises(UserError, match="max_shard_size"):
            parse_size(wrong)


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1, -5])
def test_a_truncated_file_is_named(tmp_path, keep):
    write(tmp_path / "model.safetensors", TENSORS)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is (truncated|damaged)"):
        TensorFiles(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path):
    write(tmp_path / "model.safetensors", {"t": torch.zeros(1000)})
    files = TensorFiles(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match=r"model\.safetensors is truncated at 2000 bytes"):
        files.read("t")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"t": 3}',
        b'{"t": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"t": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"t": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"t": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 5000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_header_is_named(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        TensorFiles(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_but_one_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is"):
        TensorFiles(path.parent)


def sharded(directory):
    write(directory / "model-00001-of-00002.safetensors", {"a": torch.ones(2)})
    write(directory / "model-00002-of-00002.safetensors", {"b": torch.ones(3)})
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index(directory, weight_map)
    return weight_map


def index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_through_their_index(tmp_path):
    sharded(tmp_path)
    files = TensorFiles(tmp_path)
    assert sorted(files.names()) == ["a", "b"]
    assert torch.equal(files.read("b"), torch.ones(3))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda d, m: (d / m["b"]).unlink(), r"model-00002-of-00002\.safetensors is missing"),
        (lambda d, m: index(d, m | {"c": m["a"]}), r"model-00001-of-00002\.safetensors lacks the tensor c"),
        (lambda d, m: index(d, {"a": "../a.safetensors"}), "no weight_map"),
        (lambda d, m: index(d, ["a"]), "no weight_map"),
        (lambda d, m: (d / "model.safetensors.index.json").write_text("{"), "is not JSON"),
        (lambda d, m: (d / "model.safetensors.index.json").unlink(), r"neither model\.safetensors nor"),
        (lambda d, m: write(d / m["b"], {"a": torch.ones(2), "b": torch.ones(3)}), "tensor a is in both"),
    ],
)
def test_spoilt_shards_are_named(tmp_path, spoil, named):
    spoil(tmp_path, sharded(tmp_path))
    with pytest.raises(UserError, match=named):
        TensorFiles(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds pytorch_model-00001-of-00002\.bin; save it as safetensors"):
        TensorFiles(tmp_path)


_PEAK = """
import resource, sys, torch
from pathlib import Path
from moe_llm.checkpoint.safetensors_io import ShardWriter, Spec, TensorFiles
directory, count = Path(sys.argv[1]), 64
spec = lambda i: Spec(f"t{i}", (1 << 20,), torch.float32)  # 4 MiB each, 256 MiB in all
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
writer = ShardWriter(directory / "model.safetensors", [spec(i) for i in range(count)])
for i in range(count):
    writer.write(f"t{i}", torch.full((1 << 20,), float(i)))
writer.close()
files = TensorFiles(directory)
assert all(files.read(f"t{i}")[-1] == i for i in range(count))
print((peak() - before) // 1024)
"""


def test_memory_is_bounded_by_a_few_tensors(tmp_path):
    done = subprocess.run([sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40, "MiB above the start, for 256 MiB of tensors of 4 MiB"


def test_a_header_that_claims_gigabytes_is_refused_without_reading_it(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((6 << 30).to_bytes(8, "little"))
        file.truncate(8 + (6 << 30))  # sparse: it takes no space
    tracemalloc.start()
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        TensorFiles(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2 * 10**8
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_of_the_library_is_read(tmp_path, dtype):
    stored = torch.arange(8.0).to(dtype)
    save_file({"t": stored}, tmp_path / "model.safetensors")
    assert torch.equal(TensorFiles(tmp_path).read("t").float(), stored.float())

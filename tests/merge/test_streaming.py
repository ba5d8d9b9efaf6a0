"""Memory while merging: a few spans and one tensor that is being written, whatever the models' size and number."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from merge_fakes import make_model, model_list, save

from moe_llm.merge.models import Model

_PEAK = """
import re, sys
from pathlib import Path
from moe_llm.merge.recipe import load_recipe
from moe_llm.merge.run import merge_recipe
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def run(name):
    merge_recipe(load_recipe(name + ".yaml"), Path(name + "-out"), say=lambda _: None)
run("tiny")  # what code and libraries take once is not a matter of size
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
run("large")
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Three models whose largest tensors are of 16 MB, and three tiny ones."""
    root = tmp_path_factory.mktemp("sizes")
    large = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 1}
    for name, changes in (("large", large), ("tiny", {})):
        for i in range(3):
            save(make_model(seed=i, **changes), root / f"{name}{i}")
    return root


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read where Linux tells it")
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_memory_stays_below_three_of_the_largest_tensors(sizes, tmp_path, method):
    for name in ("large", "tiny"):
        paths = [str(sizes / f"{name}{i}") for i in range(3)]
        recipe = {"merge_method": method, "models": model_list(*paths, weight=0.3), "base_model": paths[0]}
        recipe |= {"parameters": {"density": 0.3}} if method == "ties" else {"align_experts": "weights"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    largest = max(spec for spec in _sizes(Model(str(sizes / "large0"))))
    assert largest == 8000 * 512 * 4
    assert int(done.stdout) / largest < 3


def _sizes(model: Model):
    for name in model.files.names():
        rows, *columns = model.files.shape(name)
        yield 4 * rows * (columns[0] if columns else 1)

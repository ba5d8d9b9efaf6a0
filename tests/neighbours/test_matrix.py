"""Each installed tool of others reads a Mixtral, shared experts, remote code, adapters and a chat: same ids, same losses."""

import importlib.util
import json
import sys

import pytest
from support import runs

pytestmark = pytest.mark.neighbours
MODULES = {
    "transformers": "transformers", "peft": "peft", "trl": "trl", "lm_eval": "lm_eval", "mergekit": "mergekit",
    "torchao": "torchao",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("neighbours")


@pytest.mark.parametrize("tool", MODULES)
def test_ids_and_losses_are_those_of_training(tool, folder):
    if importlib.util.find_spec(MODULES[tool]) is None:
        pytest.skip(f"{tool} is not installed")
    trained = ["--trained"] if (folder / "requests.json").is_file() else []
    command = [sys.executable, str(runs.ROOT / "scripts/neighbours.py"), "--folder", str(folder), "--tools", tool]
    done = runs.finish([*command, "--page", str(folder / "page.md"), *trained], timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 5


def test_a_tool_that_reads_something_else_is_a_failure_by_name(folder, monkeypatch):
    if not (folder / "requests.json").is_file():
        pytest.skip("no checkpoints were trained")
    monkeypatch.syspath_prepend(str(runs.ROOT / "scripts"))
    neighbours = importlib.import_module("neighbours")
    oracle = neighbours.Oracle(json.loads((folder / "requests.json").read_text())["mixtral"])
    right = {"ids": oracle.ids, "losses": [oracle.loss(ids) for ids in oracle.ids]}
    assert oracle.judge(right, 1e-5)[0]
    assert not oracle.judge({**right, "losses": [loss * 1.0001 for loss in right["losses"]]}, 1e-5)[0]
    assert not oracle.judge({**right, "losses": [*right["losses"][:-1], float("nan")]}, 1e-5)[0]
    assert not oracle.judge({**right, "ids": [[*ids, 7] for ids in oracle.ids]}, 1e-5)[0]
    assert not oracle.judge({**right, "ids": oracle.ids[:-1]}, 1e-5)[0]

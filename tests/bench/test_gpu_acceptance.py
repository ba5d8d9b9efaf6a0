"""The acceptance run comes to its end anywhere at toy sizes, whatever fails on the way, and without optional packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/benchmarks/gpu_acceptance.py"
# what a bare machine lacks
WITHOUT = """
import sys
for name in ("deepspeed", "datasets", "wandb"):
    sys.modules[name] = None
"""


def run(tmp_path: Path, before: str = "") -> tuple[int, dict, str]:
    code = (
        f"{WITHOUT}\nimport runpy\nsys.argv = ['gpu_acceptance.py', '--toy', '--device', 'cpu', '--out', {str(tmp_path)!r}]\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n{before}\nimport gpu_acceptance\nsys.exit(gpu_acceptance.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    (record,) = tmp_path.glob("*.json")
    return done.returncode, json.loads(record.read_text()), next(tmp_path.glob("*.md")).read_text()


def test_every_part_runs_without_optional_packages(tmp_path):
    code, result, page = run(tmp_path)
    outcomes = {name: part["outcome"] for name, part in result["parts"].items()}
    assert set(outcomes.values()) == {"ok"}, {n: p.get("error") for n, p in result["parts"].items()}
    assert code == 0
    parts = {"environment", "parity", "products", "waits", "saving", "narrow weights", "tests", "step: toy"}
    assert parts | {"documents: 256"} <= outcomes.keys()
    assert len(result["parts"]["saving"]["result"]) == 6
    step = result["parts"]["step: toy"]["result"]
    assert step["times_transformers_best"] > 0
    assert step["contenders"]["ours"]["share_of_product_rate"] > 0
    assert "nothing about speed" in page


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    broken = "import moe_llm.bench.products as p\ndef fail(*_): raise OSError('no product today')\np.peak_rate = fail"
    broken += "\nimport gpu_acceptance as g\ng.parity = g.waits = g.saving = g.gpu_tests = lambda *_: {}"  # dear ones
    code, result, page = run(tmp_path, broken)
    assert code == 1
    assert result["parts"]["products"]["outcome"] == "FAILED"
    assert "no product today" in page
    assert result["parts"]["step: toy"]["outcome"] == result["parts"]["documents: 128"]["outcome"] == "ok"


def test_without_a_device_it_asks_for_toy_sizes():
    done = subprocess.run([sys.executable, str(SCRIPT), "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "give --toy" in done.stderr


def test_what_is_not_installed_is_named_before_any_work(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu_acceptance as g\n"
        f"g.NEEDED += ('no_such_package',); sys.argv = ['gpu_acceptance.py', '--toy', '--out', {str(tmp_path / 'out')!r}]\n"
        "g.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "not installed: no_such_package. pip install no_such_package" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [96])
def test_its_comparison_of_documents_can_fail(monkeypatch, length):
    import torch

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_acceptance

    from moe_llm.ops import attention

    monkeypatch.setattr(
        attention, "_segment_attention", lambda q, k, v, *_: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="documents differ"):
        gpu_acceptance.documents(length, torch.device("cpu"), torch.bfloat16, toy=True)

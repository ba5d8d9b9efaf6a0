"""The comparison with transformers refuses what differs."""

import json
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from support.ranks import Ranks

SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import step

    yield step
    for name in ("step", "admission", "contenders", "other_layers"):
        sys.modules.pop(name)


def tiny(step, **changes):
    defaults = {"batch": 2, "length": 32, "hidden": 32, "width": 24, "layers": 2, "heads": 4, "vocabulary": 97}
    return step.Shape(**{**defaults, **changes})


@pytest.fixture(scope="module")
def process():
    """DeepSpeed's layer needs a process group, which this process is to stay without."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_computes_the_same_is_admitted_and_a_different_model_is_not(process, dtype):
    ((failures, found),) = process.run(_departures, dtype)
    assert not failures
    assert found["ours"] <= 1
    assert found["deepspeed"] <= 1
    assert found["transformers:grouped_mm"] <= 1
    assert found["wrong"] > 1


def _departures(dtype: str) -> tuple[dict, dict]:
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    import step

    shape = tiny(step)
    state = step.weights(shape)
    ids = step.batches(shape, 1)[0]
    names = ["ours", "deepspeed", "transformers:eager", "transformers:grouped_mm"]
    models, failures = step.build_all(names, shape, state, step.DTYPES[dtype], ids)
    wrong = step.contender("ours", shape, state, step.DTYPES[dtype])
    with torch.no_grad():
        wrong.model.model.layers[1].mlp.experts.down_proj[3] *= 1.5
    return failures, step.departures({**models, "wrong": wrong}, shape, state, ids, dtype)


def test_skew_gives_one_expert_its_share_of_the_tokens(step):
    for share in (0.0, 0.6):
        shape = tiny(step, batch=8, share=share, vocabulary=1000)
        counts = step.contender("ours", shape, step.weights(shape), torch.float32).counts(step.batches(shape, 1)[0])
        busiest = [layer[0] / shape.tokens for layer in counts]
        if share:
            assert busiest == pytest.approx([share] * len(busiest), abs=0.08)
        assert all(sum(layer) == shape.tokens * shape.top_k for layer in counts)


def test_as_many_layers_as_fit_beside_all_contenders(step):
    shape = step.CUDA["Mixtral 8x7B"]
    assert shape.config.parameter_counts()["experts"] == 32 * 8 * 3 * 4096 * 14336
    one, two, four = (step.shape_that_fits(shape, n, torch.bfloat16, 640e9).layers for n in (1, 2, 4))
    assert 32 > one > two > four >= 1
    assert step.shape_that_fits(shape, 1, torch.bfloat16, 1e15) == shape
    assert step.shape_that_fits(shape, 4, torch.bfloat16, 1e6).layers == 1
    layer = 8 * 3 * 4096 * 14336 + 2 * 4096 * 4096 * (1 + 8 / 32)
    assert four * layer * (2 * 7 + 8) < 0.75 * 640e9 < (four + 1) * layer * (2 * 7 + 8) + 2 * 32000 * 4096 * 22


def test_the_cuda_suite_without_a_device_is_refused_in_a_sentence(step, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step.py", "--suites", "cuda", "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        step.main()
    assert "--suites cuda needs a CUDA device" in capsys.readouterr().err


def test_our_variants_turn_their_own_kernels_on(step, monkeypatch):
    from moe_llm.ops import compiled, kernels, liger

    shape = tiny(step)
    assert not [n for n in step.contender_names(shape) if n.startswith("ours:")]
    names = [n for n in step.contender_names(shape, device="cuda") if n.startswith("ours")]
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    on = {}
    for name in names:
        model = step.contender(name, shape, step.weights(shape), torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(liger, "available", lambda device: True)
            patch.setattr(liger, "use", lambda *_: False)
            model(step.batches(shape, 1)[0])
        on[name] = (liger.enabled, compiled.on)
    kernels.choose("torch", False, torch.device("cpu"))
    assert on == {"ours": (False, False), "ours:liger": (True, False), "ours:compiled": (False, True)}


@pytest.mark.grid  # a compiler is run
def test_a_compiled_contender_is_compared_like_any_other(step, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step.SUITES, "main", {"main": tiny(step, layers=1)})
    # without inductor, which takes half a minute
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "step.py",
            "--suites",
            "main",
            "--dtype",
            "fp32",
            "--rounds",
            "2",
            "--only",
            "ours",
            "transformers:grouped_mm",
            "--compiled",
            "transformers:grouped_mm",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ],
    )
    step.main()
    [file] = tmp_path.glob("*.json")
    [result] = json.loads(file.read_text())["results"]
    found = result["contenders"]
    assert set(found) == {"ours", "transformers:grouped_mm", "transformers:grouped_mm+compiled"}
    compiled = found["transformers:grouped_mm+compiled"]
    assert compiled["departure"] <= 1
    assert compiled["first_step_seconds"] > 2 * compiled["seconds"]  # it did compile
    assert "transformers:grouped_mm+compiled" in capsys.readouterr().out


def test_shapes_take_turns_without_contenders(step, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step.SUITES, "tokens", {f"{n} tokens": tiny(step, batch=n // 32) for n in (32, 64)})
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "step.py",
            "--suites",
            "tokens",
            "--dtype",
            "fp32",
            "--rounds",
            "2",
            "--turns-only",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ],
    )
    step.main()
    [file] = tmp_path.glob("*.json")
    first, second = json.loads(file.read_text())["results"]
    assert first["time_per_token_to_first"] == 1 != second["time_per_token_to_first"] > 0
    assert "contenders" not in first
    assert "64 tokens, fp32, taking turns" in capsys.readouterr().out


def test_peak_memory_is_the_median_of_processes_that_take_turns(step, tmp_path, monkeypatch, capsys):
    peaks = {
        "ours": iter([700, 900, 800]),
        "transformers:grouped_mm": iter([1000, 1000, 2000]),
        "transformers:eager": iter([2000, 1500, 1000]),
    }
    turns = []

    def measured(name, *_):
        turns.append(name)
        return {"peak": next(peaks[name]) * 2**20, "parameters": 2**20, "tensors": 2**21}

    monkeypatch.setattr(step, "peak_memory", measured)
    monkeypatch.setattr(step, "MEMORY", {"tiny": step.MAIN, "another": step.QUICKSTART})
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "step.py",
            "--suites",
            "memory",
            "--dtype",
            "fp32",
            "--shapes",
            "tiny",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ],
    )
    step.main()
    assert turns == [*peaks] * 3
    out = capsys.readouterr().out
    assert "ours                              800 MiB" in out
    assert "ours / transformers' least    0.800 (0.700, 0.900, 0.800); tensors alone 1.000" in out

"""Other packages' layers as contenders: the same model, and a sentence where one cannot be compared."""

import sys
from pathlib import Path

import pytest
import torch
from support import moe_packages

PACKAGES = ("scattermoe", "megablocks", "sonicmoe")


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts/benchmarks"))
    import step

    yield step
    for name in ("step", "admission", "contenders", "other_layers"):
        sys.modules.pop(name)


@pytest.fixture
def installed(monkeypatch):
    moe_packages.install(monkeypatch)


def tiny(step, **changes):
    defaults = {"batch": 2, "length": 32, "hidden": 32, "width": 24, "layers": 2, "heads": 4, "vocabulary": 97}
    return step.Shape(**{**defaults, **changes})


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_gives_transformers_weights_back_as_they_were(step, package):
    from other_layers import LAYERS

    layer, generator = LAYERS[package], torch.Generator().manual_seed(0)
    shapes = {"gate.weight": (5, 8), "experts.gate_up_proj": (5, 2 * 6, 8), "experts.down_proj": (5, 8, 6)}
    theirs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    back = layer.unpack(layer.pack(theirs), 5)
    assert back.keys() == theirs.keys() - (set() if layer.routes else {"gate.weight"})
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[name])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"experts": 6, "top_k": 3, "share": 0.6}], ids=["top 2", "top 3, skewed"])
def test_every_package_makes_the_same_step(step, installed, dtype, changes):
    shape = tiny(step, **changes)
    state, ids = step.weights(shape), step.batches(shape, 1)[0]
    models, failures = step.build_all(["transformers:eager", *PACKAGES], shape, state, step.DTYPES[dtype], ids)
    assert not failures
    found = step.departures(models, shape, state, ids, dtype)
    assert all(found[name] <= 1 for name in PACKAGES), found
    parameters = sum(tensor.numel() for tensor in state.values())
    for name in PACKAGES:
        assert {p.dtype for p in models[name].parameters()} == {step.DTYPES[dtype]}
        assert sum(p.numel() for p in models[name].parameters()) == parameters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_itself_makes_the_same_step(step, package):
    pytest.importorskip(package)
    shape = tiny(step, length=128, hidden=256, width=256)
    state, ids = step.weights(shape), step.batches(shape, 1)[0].cuda()
    models, failures = step.build_all(["transformers:eager", package], shape, state, torch.bfloat16, ids)
    assert not failures
    assert step.departures(models, shape, state, ids, "bf16")[package] <= 1


@pytest.mark.parametrize(
    ("package", "weight"), [("scattermoe", "experts.weight"), ("megablocks", "mlp.v1"), ("sonicmoe", "c_fc.weight")]
)
def test_a_package_that_orders_its_rows_otherwise_is_refused(step, installed, package, weight):
    shape = tiny(step)
    state, ids = step.weights(shape), step.batches(shape, 1)[0]
    names = ["transformers:eager", package]
    models, _ = step.build_all(names, shape, state, torch.float32, ids)
    with torch.no_grad():
        rows = models[package].model.model.layers[1].mlp.package.get_parameter(weight)
        rows.copy_(rows.flip(-2))
    assert step.departures(models, shape, state, ids, "fp32")[package] > 1


def test_a_gradient_that_is_not_a_number_is_refused(step, installed):
    shape = tiny(step)
    state, ids = step.weights(shape), step.batches(shape, 1)[0]
    models, _ = step.build_all(["transformers:eager", "megablocks"], shape, state, torch.float32, ids)
    lm_head = models["megablocks"].model.lm_head.weight
    lm_head.register_hook(lambda grad: grad * float("nan"))
    assert not step.departures(models, shape, state, ids, "fp32")["megablocks"] <= 1


def test_what_is_missing_or_of_another_release_says_so(step, installed, monkeypatch):
    def another_release(**arguments):
        raise TypeError("unexpected keyword argument 'activation_function'")

    monkeypatch.setitem(sys.modules, "scattermoe.mlp", None)
    monkeypatch.setattr(sys.modules["sonicmoe"], "MoE", another_release)
    monkeypatch.setattr(moe_packages, "GroupedGLU", lambda arguments: torch.nn.Linear(3, 3))
    shape = tiny(step)
    state, ids = step.weights(shape), step.batches(shape, 1)[0]
    models, failures = step.build_all(["transformers:eager", *PACKAGES], shape, state, torch.float32, ids)
    assert [*models] == ["transformers:eager"]
    assert all(failures[name].startswith("does not run: ") for name in PACKAGES)
    assert "scattermoe.mlp" in failures["scattermoe"]
    assert "ParallelDroplessMLP" in failures["megablocks"]
    assert "activation_function" in failures["sonicmoe"]


def test_an_implementation_that_only_infers_is_not_timed(step, monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    @torch.no_grad()
    def infer(experts, x_TD, expert_TK, weight_TK):
        return torch.zeros_like(x_TD)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "infer", infer)
    shape = tiny(step)
    assert "transformers:infer" in step.contender_names(shape)
    models, failures = step.build_all(
        ["transformers:infer"], shape, step.weights(shape), torch.float32, step.batches(shape, 1)[0]
    )
    assert not models
    assert failures["transformers:infer"].startswith("does not train: no gradient of model.layers.0.mlp")


def test_every_package_and_every_implementation_of_transformers_is_a_contender(step):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = step.contender_names(tiny(step))
    theirs = {f"transformers:{name}" for name in ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]}
    assert set(names) == {"ours", "deepspeed", *PACKAGES, *theirs}
    assert len(names) == len(set(names))


def test_only_what_is_installed_takes_room_from_the_layers(step, monkeypatch):
    import importlib.util

    here = {"deepspeed", "megablocks"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in here else None)
    names = [
        "ours",
        "ours:liger",
        "deepspeed",
        *PACKAGES,
        "transformers:eager",
        "transformers:grouped_mm",
        "transformers:deepgemm",
        "transformers:sonicmoe",
    ]
    assert [n for n in names if not step.installed(n)] == [
        "ours:liger",
        "scattermoe",
        "sonicmoe",
        "transformers:deepgemm",
        "transformers:sonicmoe",
    ]

"""After meta-training, few steps adapt to a task of the family that was not among its tasks."""

import copy
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import runs

from moe_llm.config import ModelConfig
from moe_llm.config.optim import OptimConfig
from moe_llm.data.packing import Batch
from moe_llm.errors import TrainingFailure, UserError
from moe_llm.model.init import build_model
from moe_llm.train.meta import MetaOptions, adapt, meta_train

TOKENS, LENGTH = 12, 8
OPTIM = OptimConfig(lr=0.01, weight_decay=0.0)


class Shifted:
    """Each token is a document of its own, answered by the one `shift` after it: only weights can know the shift."""

    def __init__(self, shift: int):
        self.shift = shift

    def rows(self, start: int, count: int) -> Batch:
        random = np.random.default_rng([self.shift, start])
        ids = torch.from_numpy(random.integers(0, TOKENS, (count, LENGTH)))
        places = torch.arange(LENGTH).expand(count, LENGTH)
        return Batch(ids, (ids + self.shift) % TOKENS, torch.zeros_like(ids), places, torch.ones_like(ids).bool())


class ShiftedRows(Shifted):
    """The same with a document a row: experts that choose take the even share of a document, rounded up, which is every
    token where a document is one."""

    def rows(self, start: int, count: int) -> Batch:
        batch = super().rows(start, count)
        places = torch.arange(LENGTH).expand(count, LENGTH)
        return replace(batch, document_ids_BS=torch.zeros_like(places), position_ids_BS=places)


PLAIN = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 16,
    "router_aux_loss_coef": 0.0,
}


def plain_model():
    return build_model(ModelConfig(**PLAIN), seed=0)


def test_routers_buffers_are_those_of_the_meta_trained_weights():
    """Thresholds that stayed zero would send every token to every expert in evaluation."""
    model = build_model(ModelConfig(**{**PLAIN, "num_local_experts": 4, "router": {"type": "expert_choice"}}), seed=0)
    tasks = [ShiftedRows(shift) for shift in range(3)]
    meta_train(model, tasks, OPTIM, MetaOptions("reptile", 30, 2, 2), blocks=8)
    routing = model.eval()(torch.arange(96).view(12, 8) % TOKENS).routing
    # One expert a token in training. Thresholds are means over documents, so evaluation meets that about: 0.7 to 1.0 for
    # the first seeds. (Documents of one token have four experts a token in training and about two in evaluation, those
    # whose probability is above its mean: that is no property of the thresholds.)
    assert 0.6 < (routing.tokens_per_expert_E.sum() / routing.num_tokens.sum()).item() < 1.3


def adapted(model, task, steps: int = 4) -> tuple[float, float]:
    """Losses before and after; the model stays as it is."""
    model = copy.deepcopy(model)
    before = adapt(model, task, OPTIM, steps, blocks=8)
    return before, adapt(model, task, OPTIM, 1, blocks=32, start=10_000)


@pytest.mark.parametrize(("method", "rate", "rounds"), [("reptile", 0.5, 70), ("fomaml", 5e-3, 70)])
def test_few_steps_go_further_from_the_meta_trained_weights(method, rate, rounds):
    held_out, tasks = Shifted(4), [Shifted(shift) for shift in (1, 2, 3, 5, 6, 7, 8)]
    plain, model = plain_model(), plain_model()
    told = []
    options = MetaOptions(method, rounds, inner_steps=4, tasks=3, rate=rate)
    meta_train(model, tasks, OPTIM, options, blocks=8, say=lambda *numbers: told.append(numbers))
    (plain_before, plain_after), (before, after) = adapted(plain, held_out), adapted(model, held_out)
    assert before - after > 1.5 * (plain_before - plain_after)
    assert after < plain_after
    assert told[-1][0] == rounds
    assert np.mean([t[1] - t[2] for t in told[-20:]]) > 1.5 * np.mean([t[1] - t[2] for t in told[:5]])


def test_reptile_goes_the_given_share_of_the_way_and_fomaml_the_gradient_after_it():
    one, tasks = Shifted(1), [Shifted(1)]
    begin = dict(plain_model().named_parameters())
    there = plain_model()
    adapt(there, one, OPTIM, 3, blocks=2)
    model = plain_model()
    meta_train(model, tasks, OPTIM, MetaOptions("reptile", 1, 3, 1, 0.25), blocks=2)
    for name, parameter in model.named_parameters():
        goal = dict(there.named_parameters())[name]
        assert torch.allclose(parameter, begin[name] + 0.25 * (goal - begin[name]), atol=1e-7), name
    model = plain_model()
    meta_train(model, tasks, OPTIM, MetaOptions("fomaml", 1, 3, 1, 1e-3), blocks=2)
    there.zero_grad()
    batch = one.rows(6, 2)
    there(
        batch.input_ids_BS,
        attention_mask=batch.attention_mask_BS,
        targets=batch.labels_BS,
        position_ids=batch.position_ids_BS,
        document_ids=batch.document_ids_BS,
    ).loss.backward()
    for name, parameter in model.named_parameters():  # Adam's first step is the gradient's sign
        gradient = dict(there.named_parameters())[name].grad
        clear = gradient.abs() > 1e-5
        assert torch.allclose((begin[name] - parameter)[clear], 1e-3 * gradient.sign()[clear], atol=2e-6), name


def test_a_loss_that_is_not_finite_ends_it():
    with pytest.raises(TrainingFailure, match=r"data\.sources\.0 is not finite"):
        meta_train(
            plain_model(), [Shifted(1)], OptimConfig(name="sgd", lr=1e30, grad_clip=0), MetaOptions(rounds=1), blocks=2
        )
    with pytest.raises(UserError, match="past the adapted weights"):
        MetaOptions("reptile", rate=1.5)


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("meta_train", runs.ROOT / "scripts/meta_train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sources_are_tasks_and_the_checkpoint_is_one_to_start_from(
    script, corpus, cache, tmp_path, monkeypatch, capsys, make_config
):
    from transformers import AutoModelForCausalLM

    other = runs.write_text(tmp_path / "other.txt", lines=60)
    sources = [{"type": "files", "path": str(path), "document": "line"} for path in (corpus, other)]
    config = make_config("meta", data={"sources": sources})
    out = tmp_path / "init"
    words = ["meta_train.py", str(config), "--out", str(out), "--rounds", "2", "--inner-steps", "2", "--tasks", "2"]
    monkeypatch.setattr("sys.argv", [*words, "run.seed=9"])
    assert script.main() == 0
    assert "round 2/2: loss " in capsys.readouterr().err
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert any(tensor.abs().sum() > 0 for tensor in load_file(out / "model.safetensors").values())
    assert script.main() == 2
    assert "exists" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["meta_train.py", str(make_config("one")), "--out", str(tmp_path / "no")])
    assert script.main() == 2
    assert "give two at least" in capsys.readouterr().err

"""Meta-learning in the training loop: gradients are those of the definition, a run resumes exactly and equals itself on
two ranks, and what it learns adapts faster."""

import copy

import pytest
import torch
from support import runs
from support.ci import dear
from support.ranks import Ranks

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.config import ModelConfig
from moe_llm.config.load import validate
from moe_llm.config.meta import MetaConfig
from moe_llm.errors import UserError
from moe_llm.model.init import build_model
from moe_llm.train.callbacks.meta_learning import Adaptation, gradients_of
from moe_llm.train.callbacks.registry import build_callbacks

SIZES = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,  # no choice of experts, whose borders have no slope
    "max_position_embeddings": 16,
    "router_aux_loss_coef": 0.0,
    "initializer_range": 0.3,
}
META = {"inner_steps": 2, "inner_lr": 0.05, "blocks": 2}


def task(number: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 12, (3, 8), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "targets": (ids * 5 + number) % 12}


class Toy(torch.nn.Module):
    """A small function with second derivatives of which torch knows all."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))
        self.v = torch.nn.Parameter(torch.linspace(1, 2, 2, dtype=torch.float64))

    def forward(self, w, v, number):
        x_ND = torch.randn(5, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        return ((x_ND @ w.T).tanh() @ v - x_ND.sum(1)).square().mean()


def test_mamls_gradient_is_that_of_the_loss_after_adaptation():
    toy = Toy()
    parameters, settings = [toy.w, toy.v], MetaConfig(method="maml", inner_steps=3, inner_lr=0.1)
    w, v = toy.w, toy.v
    for number in range(3):  # with torch's own second derivatives
        dw, dv = torch.autograd.grad(toy(w, v, number), [w, v], create_graph=True)
        w, v = w - 0.1 * dw, v - 0.1 * dv
    expected = torch.autograd.grad(toy(w, v, 9), parameters)
    path = Adaptation(settings, parameters, lambda number: gradients_of(toy(*parameters, number), parameters))
    torch.testing.assert_close(toy.w.detach(), w.detach())
    first_order = gradients_of(toy(*parameters, 9), parameters)
    found = path.brought_back(first_order)
    path.undo()
    for ours, theirs, plain in zip(found, expected, first_order):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        assert (plain - theirs).abs().max() > 1e-2, "the second derivatives matter"
    assert torch.equal(toy.w.detach(), torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))


def test_of_the_decoder_it_is_the_slope_of_the_adapted_loss_along_any_direction():
    model = build_model(ModelConfig(**SIZES), 0).double()
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    settings = MetaConfig(method="maml", inner_steps=2, inner_lr=0.05)

    def slopes(number):
        return gradients_of(model(**task(number)).loss, parameters)

    def adapted_loss() -> float:
        path = Adaptation(settings, parameters, slopes)
        loss = model(**task(7)).loss.item()
        path.undo()
        return loss

    path = Adaptation(settings, parameters, slopes)
    found = path.brought_back(slopes(7))
    path.undo()
    generator, length, ends = torch.Generator().manual_seed(1), 1e-4, []
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    for sign in (1, -1):
        with torch.no_grad():
            for p, begin, d in zip(parameters, start, along):
                p.copy_(begin + sign * length * d)
        ends.append(adapted_loss())
    expected = (ends[0] - ends[1]) / (2 * length)
    assert sum((g * d).sum() for g, d in zip(found, along)).item() == pytest.approx(expected, rel=1e-3)


def sections(tmp_path, texts, name: str, method: str, steps: int, **more):
    raw = runs.sections(
        texts[0], tmp_path / "cache", tmp_path / name, train={"max_steps": steps}, logging={"console": "off"},
        optim={"name": "sgd", "lr": 0.5, "grad_clip": 0.0, "weight_decay": 0.0, "schedule": "constant"}, checkpoint={"every_steps": 1},
    )  # fmt: skip
    raw["model"] = {**raw["model"], "num_experts_per_tok": 4}
    raw["data"]["sources"] = [{"type": "files", "path": str(text), "document": "line", "weight": 1} for text in texts]
    raw["train"] |= {"meta": {"method": method, **META}}
    for section, values in more.items():
        raw[section] = {**raw.get(section, {}), **values}
    return raw


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two sources, one of which is the other's words turned around."""
    root = tmp_path_factory.mktemp("texts")
    one = runs.write_text(root / "one.txt")
    other = root / "other.txt"
    other.write_text("\n".join(" ".join(line.split()[::-1])[::-1] for line in one.read_text().splitlines()) + "\n")
    return one, other


@pytest.mark.parametrize("method", dear(["reptile", "fomaml", "maml"], "maml"))
def test_a_run_resumes_exactly(tmp_path, texts, method):
    for name, lengths in (("straight", (3,)), ("resumed", (2, 3))):
        for steps in lengths:
            raw = sections(tmp_path, texts, name, method, steps)
            assert main(["train", str(runs.write_yaml(tmp_path / f"{name}.yaml", raw))]) == 0
    a, b = (MoEForCausalLM.from_pretrained(tmp_path / n / "checkpoints/latest") for n in ("straight", "resumed"))
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters()):
        assert torch.equal(p, q), name
    assert runs.timeless(tmp_path / "straight")[-1]["lm_loss"] == runs.timeless(tmp_path / "resumed")[-1]["lm_loss"]


def test_reptile_goes_the_rates_share_of_the_way_to_the_adapted_weights(tmp_path, texts):
    raw = sections(tmp_path, texts[:1] * 2, "one", "reptile", 1)
    seed = raw["run"]["seed"]
    assert main(["train", str(runs.write_yaml(tmp_path / "one.yaml", raw))]) == 0
    found = MoEForCausalLM.from_pretrained(tmp_path / "one/checkpoints/latest")
    begun = build_model(found.config, seed)
    from moe_llm.config import load_config
    from moe_llm.data.loader import load_data
    from moe_llm.data.packing import model_inputs
    from moe_llm.data.tokenizer import load_tokenizer

    data = load_data(load_config(tmp_path / "one/config.yaml", []), load_tokenizer(tmp_path / "one/checkpoints/latest"))
    there, goals = copy.deepcopy(begun), []
    targets = data.train.rows(0, 4)
    weights = [int((targets.labels_BS[targets.sources_B == s] != -100).sum()) for s in (0, 1)]
    for source in (0, 1):
        there.load_state_dict(begun.state_dict())
        for number in range(2):
            batch = data.train.of_source(source).rows(number * 2, 2)
            slopes = gradients_of(there(**model_inputs(batch)).loss, list(there.parameters()))
            with torch.no_grad():
                for p, slope in zip(there.parameters(), slopes):
                    p -= 0.05 * slope
        goals.append([p.detach().clone() for p in there.parameters()])
    for i, ((name, p), start) in enumerate(zip(found.named_parameters(), begun.parameters())):
        goal = (weights[0] * goals[0][i] + weights[1] * goals[1][i]) / sum(weights)
        torch.testing.assert_close(p, start + 0.5 * (goal - start), rtol=1e-5, atol=1e-6, msg=name)


def trained(raw: dict) -> int:
    return main(["train", str(runs.write_yaml(runs.Path(raw["run"]["dir"]).with_suffix(".yaml"), raw))])


def test_two_ranks_equal_one_process(tmp_path, texts, two_ranks_of_a_run: Ranks):
    alone = sections(tmp_path, texts, "alone", "maml", 2, train={"micro_batch_size": 2})
    assert trained(alone) == 0
    together = sections(tmp_path, texts, "together", "maml", 2, train={"micro_batch_size": 1})
    assert two_ranks_of_a_run.run(trained, together) == [0, 0]
    models = [MoEForCausalLM.from_pretrained(tmp_path / n / "checkpoints/latest") for n in ("alone", "together")]
    begun = build_model(models[0].config, alone["run"]["seed"])
    for (name, p), (_, q), start in zip(models[0].named_parameters(), models[1].named_parameters(), begun.parameters()):
        assert (p - q).abs().max() < 0.02 * (p - start).abs().max() + 1e-7, name


def test_few_steps_go_further_from_what_was_meta_learned():
    """Tasks shift tokens; from Reptile's weights a held-out shift is learned in steps that leave a random model as it was."""
    tasks = [1, 2, 3, 5, 6, 7, 8]
    config = ModelConfig(**{**SIZES, "hidden_size": 16, "intermediate_size": 16})

    def batch(shift: int, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 12, (16, 8), generator=torch.Generator().manual_seed(1000 * shift + number))
        alone = torch.arange(8).expand(16, -1)  # each token a document
        return {"input_ids": ids, "targets": (ids + shift) % 12, "document_ids": alone, "position_ids": alone * 0}

    settings = MetaConfig(method="reptile", inner_steps=4, inner_lr=0.5)

    def gain(model) -> float:
        parameters = list(model.parameters())
        before = model(**batch(4, 99)).loss.item()
        path = Adaptation(settings, parameters, lambda n: gradients_of(model(**batch(4, n)).loss, parameters))
        after = model(**batch(4, 99)).loss.item()
        path.undo()
        return before - after

    model = build_model(config, 0)
    plain, parameters = gain(model), list(model.parameters())
    for round_ in range(60):
        shift = tasks[round_ % len(tasks)]
        path = Adaptation(
            settings,
            parameters,
            lambda n, s=shift, r=round_: gradients_of(model(**batch(s, 10 * r + n)).loss, parameters),
        )
        way = path.way_back()
        path.undo()
        with torch.no_grad():
            for p, part in zip(parameters, way):
                p -= 0.5 * part
    assert gain(model) > 1.5 * plain


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"meta": {"inner_steps": 3}}}, "applies to nothing without a method"),
        ({"parallel": {"zero_stage": 3}}, "cuts them up"),
        ({"model": {"balance_over": "step"}}, "has no counts of a step beforehand"),
        ({"data": {"sources": [{"type": "python_stdlib"}]}}, "needs a task in each of several data.sources"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, texts, changes, words):
    with pytest.raises(UserError) as refused:
        validate(sections(tmp_path, texts, "x", "maml", 1, **changes))
    assert words in str(refused.value)


def test_bf16_is_refused(tmp_path, texts):
    config = validate(sections(tmp_path, texts, "x", "maml", 1, train={"precision": "bf16"}))
    with pytest.raises(UserError, match=r"train\.precision=bf16 rounds away"):
        build_callbacks(config)

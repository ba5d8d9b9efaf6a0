"""Perturbed embeddings, and routers in turns with the rest (AdvMoE, Zhang et al. 2023)."""

import json

import pytest
import torch
from support import runs
from support.training import MODEL, config, rows, train_steps

from moe_llm.checkpoint.pretrained import MoEForCausalLM
from moe_llm.cli import main
from moe_llm.config import load_config
from moe_llm.config.adversarial import AdversarialConfig
from moe_llm.config.load import validate
from moe_llm.data.packing import model_inputs
from moe_llm.errors import UserError
from moe_llm.evaluation.evaluate import evaluate_files
from moe_llm.families.hf import is_router
from moe_llm.model.init import build_model
from moe_llm.train.callbacks.adversarial import find_perturbation
from moe_llm.train.callbacks.alternating_updates import AlternatingUpdates

CASES = {
    "fast, l2": {"epsilon": 0.2},
    "fast, linf": {"epsilon": 0.03, "norm": "linf"},
    "projected, l2": {"epsilon": 0.2, "steps": 3, "step_size": 0.15},
    "projected, linf": {"epsilon": 0.03, "norm": "linf", "steps": 3},
}
TURNS = {"epsilon": 0.1, "router_every": 2}


def model_and_inputs(count: int = 4, **router):
    model = build_model(config(2, 2, 1, model={"router": router} if router else {}).model, 0)
    return model, model_inputs(rows(0, 0, count))


def loss_of(model, inputs, delta_BSD):
    """By another way than the model's: the embedding layer's output is replaced."""
    hook = model.model.embed_tokens.register_forward_hook(lambda module, ids, x_BSD: x_BSD + delta_BSD)
    try:
        return model(**inputs).loss_sum
    finally:
        hook.remove()


def by_definition(model, inputs, epsilon, norm="l2", steps=1, step_size=None):
    """delta <- P(delta + stride * steepest(gradient of the loss)), token by token."""
    stride = step_size or min(epsilon, 2.5 * epsilon / steps)
    delta_BSD = torch.zeros(*inputs["input_ids"].shape, MODEL["hidden_size"])
    for _ in range(steps):
        leaf = delta_BSD.clone().requires_grad_()
        slope_BSD = torch.autograd.grad(loss_of(model, inputs, leaf), leaf)[0]
        for b, s in torch.cartesian_prod(*map(torch.arange, delta_BSD.shape[:2])).tolist():
            slope_D = slope_BSD[b, s]
            if norm == "linf":
                delta_BSD[b, s] = (delta_BSD[b, s] + stride * slope_D.sign()).clamp(-epsilon, epsilon)
            elif slope_D.any():
                moved_D = delta_BSD[b, s] + stride * slope_D / slope_D.norm()
                delta_BSD[b, s] = moved_D * min(1.0, epsilon / moved_D.norm().item())
    return delta_BSD


@pytest.mark.parametrize("case", CASES)
def test_the_perturbation_is_the_papers_within_its_ball_and_raises_the_loss(case):
    model, inputs = model_and_inputs()
    settings = AdversarialConfig(**CASES[case])
    delta_BSD = find_perturbation(model, inputs, settings)
    torch.testing.assert_close(delta_BSD, by_definition(model, inputs, **CASES[case]), rtol=1e-4, atol=1e-6)
    length_BS = torch.linalg.vector_norm(delta_BSD, float("inf") if settings.norm == "linf" else 2, dim=-1)
    assert length_BS.max() <= settings.epsilon * (1 + 1e-6)
    mask_BS = inputs["attention_mask"] != 0
    assert not delta_BSD[~mask_BS].any()
    clean = model(**inputs).loss_sum
    perturbed = model(**inputs, perturbation=delta_BSD).loss_sum
    torch.testing.assert_close(perturbed, loss_of(model, inputs, delta_BSD), rtol=1e-6, atol=0)
    assert perturbed > clean + 0.5


def test_a_small_one_raises_the_loss_by_its_slope():
    """First order: epsilon times the sum over tokens of the slope's norm."""
    model, inputs = model_and_inputs()
    zero = torch.zeros(*inputs["input_ids"].shape, MODEL["hidden_size"], requires_grad=True)
    clean = model(**inputs, perturbation=zero).loss_sum
    slope = torch.autograd.grad(clean, zero)[0].norm(dim=-1).sum()
    delta_BSD = find_perturbation(model, inputs, AdversarialConfig(epsilon=1e-3))
    rise = model(**inputs, perturbation=delta_BSD).loss_sum - clean
    assert rise.item() == pytest.approx(1e-3 * slope.item(), rel=0.1)


def test_it_is_the_same_however_the_rows_are_cut_and_recomputed():
    settings = AdversarialConfig(epsilon=0.2, steps=2)
    model, inputs = model_and_inputs(4, type="mixtral", capacity_factor=0.8)
    whole = find_perturbation(model, inputs, settings)
    model.model.recompute = True
    torch.testing.assert_close(find_perturbation(model, inputs, settings), whole, rtol=1e-4, atol=1e-6)
    for i in range(4):
        part = find_perturbation(model, model_inputs(rows(0, i, 1)), settings)
        torch.testing.assert_close(part, whole[i : i + 1], rtol=1e-3, atol=1e-5)


def test_looking_for_it_leaves_nothing_behind():
    """No gradient, no requirement changed, and no random number drawn: what trains is what was attacked."""
    model, inputs = model_and_inputs(4, type="noisy_top_k")
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = find_perturbation(model, inputs, AdversarialConfig(epsilon=0.2, steps=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(2)
    assert not torch.equal(find_perturbation(model, inputs, AdversarialConfig(epsilon=0.2, steps=2)), first)


def run_of(optimizer: str = "adamw", precision: str = "fp32", finetune: dict | None = None, **adversarial):
    return config(
        3,
        2,
        1,
        optimizer=optimizer,
        train={"adversarial": adversarial, "precision": precision},
        **({"finetune": finetune} if finetune else {}),
    )


def test_frozen_parts_are_attacked_and_stay():
    found = train_steps(run_of(epsilon=0.2, finetune={"trainable": "experts"}), 2)
    plain = train_steps(run_of(finetune={"trainable": "experts"}), 2)
    assert found["losses"][0] > plain["losses"][0]
    start = train_steps(run_of(finetune={"trainable": "experts"}), 0)["weights"]
    for name, (_, weight) in found["weights"].items():
        assert torch.equal(weight, start[name][1]) == ("experts" not in name), name


GOLDEN = [5.275891304016113, 5.116340637207031, 5.364117622375488, 5.3347272872924805]


def test_the_curve_is_the_committed_one():
    assert train_steps(run_of(**TURNS), 4)["losses"] == pytest.approx(GOLDEN, rel=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("router", ["mixtral", "bias_balanced"])
def test_what_is_idle_is_unchanged_to_the_bit(precision, router):
    cfg = run_of(precision=precision, **TURNS)
    raw = cfg.model_dump(mode="json")
    cfg = validate({**raw, "model": {**raw["model"], "router": {"type": router}}})
    states = [train_steps(cfg, steps) for steps in (1, 2, 3)]
    start = train_steps(cfg, 0)["weights"]
    for before, after, routers in (
        (start, states[0], False),
        (states[0], states[1], True),
        (states[1], states[2], False),
    ):
        weights = before if before is start else before["weights"]
        for name, (_, weight) in after["weights"].items():
            assert torch.equal(weight, weights[name][1]) == (is_router(name) != routers), name
        for kind in ("exp_avg", "exp_avg_sq") if before is not start else ():
            for name, (_, moment) in after[kind].items():
                assert torch.equal(moment, before[kind][name][1]) == (is_router(name) != routers), name


def test_an_active_step_is_that_of_a_run_that_trains_this_part_alone():
    """With its own norm and bound: what is idle has no share in them."""
    turns = train_steps(run_of(router_every=2), 1)
    rest = [name for name in turns["weights"] if not is_router(name)]
    alone = train_steps(run_of(finetune={"trainable": rest}), 1)
    assert turns["norms"] == pytest.approx(alone["norms"], rel=1e-6)
    for name in rest:
        torch.testing.assert_close(turns["weights"][name][1], alone["weights"][name][1], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted(tmp_path, first, precision):
    cfg = run_of(precision=precision, **TURNS)
    straight, begun = train_steps(cfg, 5), train_steps(cfg, first, save=str(tmp_path))
    resumed = train_steps(cfg, 5 - first, source=begun["saved"], first=first)
    assert begun["losses"] + resumed["losses"] == straight["losses"]
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for name, (_, tensor) in straight[kind].items():
            assert torch.equal(resumed[kind][name][1], tensor), (kind, name)


@pytest.mark.parametrize("every", [2, 3, 5])
def test_turns_and_counts_of_updates_agree(every):
    settings = AdversarialConfig(router_every=every)
    for updates in range(12):
        turn = settings.turn(updates)
        assert turn == ("routers" if updates % every == every - 1 else "rest")
        for routers in (True, False):
            gained = settings.updates_of(routers, updates + 1) - settings.updates_of(routers, updates)
            assert gained == ((turn == "routers") == routers)
    assert AdversarialConfig().turn(3) == "all"
    assert AdversarialConfig().updates_of(True, 3) == 3


def test_a_whole_run(train, corpus, capsys):
    """It says what it does; validation is of text as it is; interrupted and resumed it is the same."""
    section = {"micro_batch_size": 2, "global_batch_size": 4, "adversarial": {"epsilon": 0.5, "router_every": 2}}
    straight = train("straight", train={**section, "max_steps": 6}, optim={"lr": 3e-3, "schedule": "constant"})
    told = capsys.readouterr().err
    assert "trains on embeddings moved by up to 0.5 (l2) towards a higher loss" in told
    assert "routers are trained alone in one of 2 steps" in told
    last = runs.records(straight)[-1]
    checkpoint = straight / "checkpoints/step-00000006"
    clean = evaluate_files(checkpoint, str(corpus), sequence_length=32)["loss"]
    assert last["val_loss"] == pytest.approx(clean, rel=0.05)
    assert last["lm_loss"] > last["val_loss"] + 0.3
    assert last["moe"].get("expert_grad_norm") is None  # the sixth step was the routers'
    newest = runs.records(straight)[-2]["moe"]["expert_grad_norm"]
    assert newest is not None

    seldom = train(
        "seldom",
        train={**section, "max_steps": 6},
        optim={"lr": 3e-3, "schedule": "constant"},
        logging={"every_steps": 2},
    )
    assert [record["step"] for record in runs.records(seldom)] == [2, 3, 4, 6]
    assert runs.records(seldom)[-1]["moe"]["expert_grad_norm"] == newest  # the routers' turns are the recorded ones

    resumed = train("resumed", train={**section, "max_steps": 3}, optim={"lr": 3e-3, "schedule": "constant"})
    train("resumed", train={**section, "max_steps": 6}, optim={"lr": 3e-3, "schedule": "constant"})
    ours, theirs = (MoEForCausalLM.from_pretrained(root / "checkpoints/step-00000006") for root in (resumed, straight))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "mixtral"


def test_a_run_goes_on_as_it_began(train, make_config, capsys):
    section = {"max_steps": 2, "micro_batch_size": 2, "global_batch_size": 4}
    train(train={**section, "adversarial": {"router_every": 2}})
    assert main(["train", str(make_config(train={**section, "max_steps": 4}))]) == 2
    assert "train.adversarial" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.adversarial.norm=linf"], "train.adversarial.norm=linf applies to nothing without epsilon"),
        (["train.adversarial.steps=2"], "train.adversarial.steps=2 applies to nothing without epsilon"),
        (["train.adversarial.step_size=0.1"], "train.adversarial.step_size=0.1 applies to nothing without epsilon"),
        (["train.adversarial={epsilon: 0.1, step_size: 0.3}"], "step_size=0.3 is above the width of the ball"),
        (["train.adversarial.epsilon=0"], "train.adversarial.epsilon=0"),
        (["train.adversarial.router_every=1"], "train.adversarial.router_every=1"),
    ],
)
def test_settings_that_say_nothing_are_refused(overrides, named):
    with pytest.raises(UserError) as raised:
        load_config(runs.ROOT / "configs/quickstart.yaml", overrides)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["finetune.trainable=experts"], "this run trains no routers"),
        (["finetune.trainable=router"], "this run trains nothing but routers"),
        (["train.max_steps=1"], "leaves no step of 1 to the routers"),
    ],
)
def test_turns_that_train_nothing_are_refused(overrides, named):
    cfg = load_config(runs.ROOT / "configs/adversarial.yaml", overrides)
    with pytest.raises(UserError, match=named):
        AlternatingUpdates().validate(cfg)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["plan", "--gpus", "2", "--gpu-memory", "80GB"], "takes passes that plans do not count"),
        (["bench"], "is not part of the step that is timed"),
    ],
)
def test_what_does_not_count_it_says_so(command, named, capsys):
    assert main([*command, str(runs.ROOT / "configs/adversarial.yaml")]) == 2
    assert named in capsys.readouterr().err


def test_the_file_with_its_source_is_mixtrals_but_for_this():
    cfg = load_config(runs.ROOT / "configs/adversarial.yaml")
    mixtral = load_config(runs.ROOT / "configs/routing/mixtral.yaml")
    assert cfg.model == mixtral.model
    AlternatingUpdates().validate(cfg)
    assert "2308.10110" in (runs.ROOT / "configs/adversarial.yaml").read_text()

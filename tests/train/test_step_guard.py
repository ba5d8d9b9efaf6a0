"""Steps that must not be taken: found before they change anything, the same on all ranks, and named."""

import itertools
import math

import pytest
import torch
from support.ci import dear
from support.ranks import fresh_accelerate
from support.training import config, rows

from moe_llm.data.packing import model_inputs
from moe_llm.distributed.runtime import start
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.model.moe.experts import Experts
from moe_llm.train.build import build_trained, restore
from moe_llm.train.callbacks.step_guard import StepGuard

LAYOUTS = ["1", "z1", "z2", "z3"]  # one process; two ranks that share the experts, by ZeRO stage
TRAIN = {"max_steps": 100, "micro_batch_size": 2, "global_batch_size": 8, "device": "cpu"}


def cfg_of(layout: str, precision: str, **more):
    world = 1 if layout == "1" else 2
    return config(
        2, 1, world, ep=world, stage=int(layout[-1]), optimizer="adamw", train={**TRAIN, "precision": precision}, **more
    )


def on_ranks(request, layout: str, function, *args) -> list:
    if layout == "1":
        return [function(*args)]
    return request.getfixturevalue("two_ranks").run(function, *args)


class Steps:
    """Training steps by hand, with faults."""

    def __init__(self, cfg):
        fresh_accelerate()
        self.cfg, self.runtime = cfg, start(cfg)
        self.engine, _ = build_trained(cfg, self.runtime, None)
        self.health = StepGuard(cfg, self.engine, self.runtime)

    def backward(self, step: int, *, bad_loss: tuple[int, int] | None = None) -> list[torch.Tensor]:
        """Losses of one step's micro-batches; that of (rank, micro-batch) is made infinite."""
        ranks, rank = self.runtime.world_size, self.runtime.rank
        rounds = self.cfg.accumulation_steps(ranks)
        batches = [rows(step, (j * ranks + rank) * 2, 2) for j in range(rounds)]
        step_loss, losses = StepLoss(self.cfg.model, self.runtime, batches), []
        for j, batch in enumerate(batches):
            total = step_loss(self.engine.forward(**model_inputs(batch))).total
            if bad_loss == (rank, j):
                total = total * torch.tensor(float("inf"))
            self.engine.backward(total, last=j == rounds - 1)
            losses.append(total.detach())
        return losses

    def state(self) -> dict[str, torch.Tensor]:
        kinds = ("weight", *self.engine.kinds)
        return {f"{e.name} {k}": self.engine.read(e.name, k).clone() for e in self.engine.entries() for k in kinds}

    def poison(self, layer: int, expert: int, value: float):
        """From now on the gradient of one expert's down projection, on the rank that holds it."""
        experts = [m for m in self.engine.model.modules() if isinstance(m, Experts)][layer]
        local = expert - experts.first_expert
        held = 0 <= local < 4 // self.runtime.world_size

        def spoil(gradient):
            gradient = gradient.clone()
            gradient[local, 1, 2] = value
            return gradient

        return experts.down_proj.register_hook(spoil if held else (lambda gradient: gradient))


def fault(cfg, kind: str) -> dict:
    """One good step, one with a fault that is discarded, one good step; and the same without the bad one."""
    results = {}
    for planted in (True, False):
        run = Steps(cfg)
        run.backward(0)
        run.engine.step(1e-2)
        before = run.state()
        if planted:
            hook = None if kind == "loss" else run.poison(1, 2, math.inf if kind == "inf" else math.nan)
            losses = run.backward(1, bad_loss=(run.runtime.world_size - 1, 1) if kind == "loss" else None)
            results["trouble"] = run.health.inspect(2, 8, losses)
            run.engine.discard()
            if hook is not None:
                hook.remove()
            after = run.state()
            results["changed"] = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
        assert run.health.inspect(3, 16, run.backward(2)) is None
        results[planted, "norm"] = run.engine.step(1e-2)
        results[planted, "state"] = run.state()
    return results


@pytest.mark.parametrize(
    ("layout", "precision", "kind"),
    dear(
        [(layout, precision, "nan") for layout in LAYOUTS for precision in ("fp32", "bf16")]
        + [
            ("1", "fp32", "loss"),
            ("z1", "bf16", "loss"),
            ("z2", "fp32", "loss"),
            ("z3", "bf16", "loss"),
            ("z1", "fp32", "inf"),
        ],
        *[
            ("1", "fp32", "nan"),
            ("1", "bf16", "nan"),
            ("1", "fp32", "loss"),
            ("z2", "fp32", "loss"),
            ("z3", "bf16", "nan"),
        ],
    ),
)
def test_a_bad_step_leaves_no_trace_and_is_named_on_all_ranks(request, layout, precision, kind):
    found = on_ranks(request, layout, fault, cfg_of(layout, precision), kind)
    trouble = found[0]["trouble"]
    for per_rank in found:
        assert per_rank["trouble"] == trouble
        assert per_rank["changed"] == []
        assert per_rank[True, "norm"] == per_rank[False, "norm"]
        for name, tensor in per_rank[False, "state"].items():
            assert torch.equal(per_rank[True, "state"][name], tensor), name
    assert trouble.weights_finite
    if kind == "loss":
        # micro-batch 1 of the last rank: behind those of the others
        begin = 8 + (2 if layout == "1" else 6)
        assert trouble.samples == [[begin, begin + 1]]
        assert trouble.bad_parameters > 1
    else:
        assert trouble.samples == []
        assert (trouble.parameter, trouble.layer, trouble.expert) == ("model.layers.1.mlp.experts.down_proj", 1, 2)
        assert trouble.bad_parameters == 1
        assert "model.layers.1.mlp.experts.down_proj, expert 2" in trouble.sentence


def norms(cfg) -> tuple[float, float]:
    run = Steps(cfg)
    run.backward(0)
    square = run.runtime.sum(run.engine.gradient_square()).item()
    return math.sqrt(square), run.engine.step(1e-2)


@pytest.mark.parametrize(
    ("layout", "precision"),
    dear(itertools.product(LAYOUTS, ("fp32", "bf16")), ("1", "bf16"), ("z1", "bf16"), ("z2", "fp32"), ("z3", "bf16")),
)
def test_what_is_looked_at_is_every_gradient_once(request, layout, precision):
    for ours, clipped_by in on_ranks(request, layout, norms, cfg_of(layout, precision)):
        assert ours == pytest.approx(clipped_by, rel=1e-5)


def spoiled_weight(cfg) -> list[bool]:
    run = Steps(cfg)
    run.backward(0)
    run.engine.step(1e-2)
    answers = [run.health.weights_finite()]
    entry = next(e for e in run.engine.entries() if e.first_expert is not None)
    value = run.engine.read(entry.name, "weight").clone()
    if run.runtime.rank == run.runtime.world_size - 1:
        value.view(-1)[5] = math.nan
    run.engine.write(entry.name, "weight", value)
    return [*answers, run.health.weights_finite()]


@pytest.mark.parametrize(
    ("layout", "precision"),
    dear([("1", "fp32"), ("z1", "bf16"), ("z2", "fp32"), ("z3", "bf16")], ("1", "fp32"), ("z3", "bf16")),
)
def test_weights_that_are_not_finite_are_seen_on_all_ranks(request, layout, precision):
    for answers in on_ranks(request, layout, spoiled_weight, cfg_of(layout, precision)):
        assert answers == [True, False]


def test_a_norm_that_overflows_is_trouble_though_each_gradient_is_finite():
    run = Steps(cfg_of("1", "fp32"))
    losses = run.backward(0)
    run.engine._trained[0].grad[0, 0] = 1e30
    trouble = run.health.inspect(1, 0, losses)
    assert trouble.parameter is None
    assert trouble.sentence.endswith("its losses are; each gradient is, and their norm is not")


def bad_step(run: Steps):
    run.backward(0)
    found = run.health.inspect(1, 0, [torch.tensor(math.nan)] * 4)
    run.engine.discard()
    return found


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_patience_ends_after_so_many(policy):
    cfg = config(
        2,
        1,
        1,
        optimizer="adamw",
        checkpoint={"every_steps": 5},
        train={**TRAIN, "precision": "fp32", "on_nan": policy, "max_bad_steps": 2},
    )
    run = Steps(cfg)
    assert [run.health.respond(bad_step(run))[0] for _ in range(3)] == [policy, policy, "stop"]
    run.health.saved()
    assert run.health.respond(bad_step(run))[0] == policy
    assert run.health.inspect(2, 8, run.backward(0)) is None
    run.engine.discard()
    # a good step after a rollback only repeats what was there; after a skip it is new
    again = [run.health.respond(bad_step(run))[0] for _ in range(2)]
    assert again == ([policy, policy] if policy == "skip" else [policy, "stop"])


def test_leaving_a_batch_out_is_no_answer_to_bad_weights():
    cfg = config(2, 1, 1, train={**TRAIN, "precision": "fp32", "on_nan": "skip"})
    run = Steps(cfg)
    with torch.no_grad():
        next(run.engine.model.parameters())[0, 0] = math.nan
    assert run.health.respond(bad_step(run)) == ("stop", "leaving out a batch does not mend weights")


def gone_back(cfg, root: str) -> list[str]:
    """What differs from the first time: the tensors after going back, and after one more step from there."""
    from moe_llm.checkpoint.state import save_checkpoint
    from moe_llm.config import dump_config

    run = Steps(cfg)
    run.backward(0)
    run.engine.step(1e-2)
    path = save_checkpoint(
        root,
        run.engine,
        step=2,
        trainer_state={"step": 2, "samples": 16, "tokens": 192, "skipped": 1},
        model_config=cfg.model,
        run_config_text=dump_config(cfg),
        tokenizer=None,
        dtype="fp32",
    )
    saved = run.state()
    norms, states = [], []
    for _ in range(2):
        run.backward(1)
        norms.append(run.engine.step(1e-2))
        states.append(run.state())
        run.backward(2)
        run.engine.discard()
        position = restore(run.engine, path, hashes=True)
        assert (position.step, position.updates) == (2, 1)
        states.append(run.state())
    assert norms[0] == norms[1]
    pairs = [(saved, states[1]), (saved, states[3]), (states[0], states[2])]
    return [name for before, after in pairs for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@pytest.mark.parametrize(
    ("layout", "precision"),
    dear(
        [("1", "bf16"), ("z1", "bf16"), ("z2", "fp32"), ("z3", "bf16")], ("1", "bf16"), ("z1", "bf16"), ("z2", "fp32")
    ),
)
def test_going_back_in_the_process_restores_every_bit(request, tmp_path, layout, precision):
    for differing in on_ranks(request, layout, gone_back, cfg_of(layout, precision), str(tmp_path)):
        assert differing == []

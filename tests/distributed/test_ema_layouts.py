"""The average of the weights is the same in every layout, and is what a hand computes from the weights of each step."""

from pathlib import Path

import pytest
import torch
from support.ci import dear
from support.ranks import fresh_accelerate
from support.training import config, difference, rows

from moe_llm.checkpoint.state import save_checkpoint
from moe_llm.config import dump_config
from moe_llm.data.packing import model_inputs
from moe_llm.distributed.runtime import start
from moe_llm.distributed.state import EMA
from moe_llm.distributed.step_loss import StepLoss
from moe_llm.train.build import build_trained, restore
from moe_llm.train.callbacks.ema import averaged_weights
from moe_llm.train.trainer import learning_rate

STEPS, DECAY = 4, 0.7
AVERAGED = {"checkpoint": {"ema": {"decay": DECAY}}}
LAYOUTS = {"2x2z1": (2, 1), "2x2z2": (2, 2), "2x2z3": (2, 3), "2x1z1": (1, 1), "2x1z3": (1, 3)}


def run_of(layout: str, precision: str = "fp32", **more):
    world, (ep, stage) = (1, (1, 1)) if layout == "1" else (2, LAYOUTS[layout])
    micro = 4 // world
    return config(
        micro,
        1,
        world,
        ep=ep,
        stage=stage,
        optimizer="adamw" if precision == "bf16" else "sgd",
        train={
            "max_steps": 100,
            "micro_batch_size": micro,
            "global_batch_size": 4,
            "precision": precision,
            "device": "cpu",
        },
        **{**AVERAGED, **more},
    )


def weights(engine, kind: str = "weight") -> dict:
    entries = [entry for entry in engine.entries() if entry.trainable]
    return {entry.name: (entry.first_expert, engine.read(entry.name, kind).clone()) for entry in entries}


def same(a: dict, b: dict) -> bool:
    """Whether two results of `weights` are equal; call that, which is collective, before `and` can leave it out."""
    return all(torch.equal(a[name][1], b[name][1]) for name in a)


class Training:
    """Steps whose average is kept, with one computed by hand beside it."""

    def __init__(self, cfg, source: str | None):
        fresh_accelerate()
        self.cfg, self.runtime = cfg, start(cfg)
        self.engine, self.position = build_trained(cfg, self.runtime, Path(source) if source else None)
        self.past: list[dict] = []

    def loss(self, step: int):
        batch = rows(step, self.runtime.rank * self.cfg.train.micro_batch_size, self.cfg.train.micro_batch_size)
        return StepLoss(self.cfg.model, self.runtime, [batch])(self.engine.forward(**model_inputs(batch))).total

    def step(self) -> None:
        self.engine.backward(self.loss(self.position.step), last=True)
        self.engine.step(learning_rate(self.cfg, self.position.step))
        self.engine.update_average()
        self.position.step += 1
        self.past.append(weights(self.engine))

    def by_hand(self) -> dict:
        shares = [DECAY**age for age in range(len(self.past))]
        return {
            name: (
                None,
                sum(share * past[name][1].double() for share, past in zip(shares, reversed(self.past)))
                .div(sum(shares))
                .float(),
            )
            for name in self.past[0]
        }

    def save(self, root: str) -> str:
        at = self.position.step
        return str(
            save_checkpoint(
                root,
                self.engine,
                step=at,
                trainer_state={"step": at, "samples": 4 * at, "tokens": 48 * at},
                model_config=self.cfg.model,
                run_config_text=dump_config(self.cfg),
                tokenizer=None,
                dtype=self.cfg.checkpoint.dtype,
            )
        )


def observe(cfg, source: str | None, steps: int, root: str) -> dict:
    """Some steps, a save, two further steps, and back to what was saved."""
    training = Training(cfg, source)
    engine, found = training.engine, {}
    if source is not None:
        found["loaded"] = weights(engine, EMA)
    for _ in range(steps):
        training.step()
    average, before = weights(engine, EMA), weights(engine)
    found |= {"average": average, "updates": engine.averaged, "weights": before}
    if source is None:
        own = {name: (None, tensor) for name, (_, tensor) in average.items()}  # both are of this rank's experts
        found["by_hand"] = difference([{EMA: own}], {EMA: training.by_hand()}, EMA)
    with torch.no_grad():
        losses = [float(training.loss(77).detach())]
        with averaged_weights(engine):
            exchanged, kept = weights(engine), weights(engine, EMA)
            found["inside"] = same(exchanged, average) and same(kept, before)
            losses.append(float(training.loss(77).detach()))
        losses.append(float(training.loss(77).detach()))
    found["losses"] = losses
    exchanged, kept = weights(engine), weights(engine, EMA)
    found["back"] = same(exchanged, before) and same(kept, average)
    found["saved"] = training.save(root)
    training.step()
    moved = not same(weights(engine, EMA), average)
    restore(engine, Path(found["saved"]), hashes=True)
    kept = weights(engine, EMA)
    found["restored"] = moved and engine.averaged == found["updates"] and same(kept, average)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return observe(run_of("1"), None, STEPS, str(tmp_path_factory.mktemp("alone")))


def check(found: dict) -> None:
    """What holds in every layout."""
    assert found["inside"]
    assert found["back"]
    first, inside, last = found["losses"]
    assert first == last != inside
    assert found["restored"]


def test_one_process_averages_as_a_hand_does(alone):
    check(alone)
    assert alone["updates"] == STEPS
    assert alone["by_hand"][0] < 1e-6, alone["by_hand"]
    assert difference([{EMA: alone["average"]}], {EMA: alone["weights"]}, EMA)[0] > 1e-3  # it is not the weights


@pytest.mark.parametrize("layout", dear(LAYOUTS, "2x2z1", "2x2z2", "2x1z3"))
def test_ranks_average_as_one_process_does_and_their_average_moves_between_layouts(two_ranks, tmp_path, alone, layout):
    found = two_ranks.run(observe, run_of(layout), None, STEPS, str(tmp_path))
    for rank in found:
        check(rank)
        assert rank["updates"] == STEPS
        assert rank["by_hand"][0] < 1e-6, rank["by_hand"]
    assert difference(found, alone, "average")[0] < 1e-5
    # what the ranks have written, one process reads to the bit, and the other way round
    taken = Training(run_of("1"), found[0]["saved"]).engine
    assert taken.averaged == STEPS
    for rank in found:
        assert difference([{EMA: rank["average"]}], {EMA: weights(taken, EMA)}, EMA)[0] == 0
    back = two_ranks.run(observe, run_of(layout), alone["saved"], 1, str(tmp_path / "back"))
    for rank in back:
        check(rank)
        assert rank["updates"] == STEPS + 1
    assert difference([{"average": rank["loaded"]} for rank in back], alone, "average")[0] == 0


@pytest.mark.parametrize("layout", dear(["2x2z1", "2x2z3"], "2x2z3"))
def test_in_bf16_the_average_is_of_the_fp32_masters(two_ranks, tmp_path, layout):
    cfg = run_of(layout, "bf16", checkpoint={"dtype": "bf16", "ema": {"decay": DECAY}})
    first = two_ranks.run(observe, cfg, None, STEPS, str(tmp_path))
    for rank in first:
        check(rank)
        assert rank["by_hand"][0] < 1e-6, rank["by_hand"]
        assert any((t != t.bfloat16().float()).any() for _, t in rank["average"].values())
    second = two_ranks.run(observe, cfg, first[0]["saved"], 0, str(tmp_path / "again"))
    assert all(same(a["average"], b["loaded"]) for a, b in zip(first, second, strict=True))

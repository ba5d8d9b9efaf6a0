"""Ranks that share sequences compute what one process computes: documents, windows, chat, routers, with EP and ZeRO."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ci import dear
from support.training import MODEL, config, difference, train_steps

from moe_llm.config.load import validate
from moe_llm.data.blocks import TrainBlocks, ValidationBlocks
from moe_llm.data.cache import TokenizedText
from moe_llm.data.examples import PackedExamples
from moe_llm.data.loader import TrainLoader
from moe_llm.data.packing import PackedBlocks
from moe_llm.errors import UserError

LENGTH, BLOCKS, STEPS = 24, 4, 3


def text(chat: bool) -> TokenizedText:
    """Documents of 3 to 40 tokens, so that blocks hold several, and some reach over the parts of a block."""
    random = np.random.default_rng(7)
    lengths = random.integers(3, LENGTH if chat else 40, 60)
    starts = np.concatenate([[0], lengths.cumsum()])
    tokens = random.integers(0, MODEL["vocab_size"], starts[-1])
    targets = (random.random(starts[-1]) < 0.5).astype(np.uint8) if chat else None
    if targets is not None:
        targets[starts[1:] - 1] = 1
    return TokenizedText(tokens, starts, lengths, int(lengths.sum()), targets)


def blocks(kind: str) -> PackedBlocks:
    if kind == "chat":
        return PackedExamples(text(True), LENGTH, "drop", 0)
    return PackedBlocks(text(False), LENGTH, kind == "documents", 0)


def read(kind: str, cfg, runtime, step: int, rounds: int):
    loader = TrainLoader(
        TrainBlocks([blocks(kind)], None, 0),
        position=step * cfg.train.global_batch_size,
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        prefetch=0,
        **runtime.reads,
    )
    return next(loader)


def read_documents(*asked):
    return read("documents", *asked)


def read_chat(*asked):
    return read("chat", *asked)


def read_whole(*asked):
    return read("whole", *asked)


READERS = {"documents": read_documents, "chat": read_chat, "whole": read_whole}


def layout(world: int, sp: int, *, ep: int = 1, stage: int = 1, rounds: int = 1, model=None, **more):
    """`BLOCKS` blocks a step on `world` ranks, of which `sp` share a block."""
    made = config(
        BLOCKS * sp // world // rounds, rounds, 1, ep=ep, stage=stage, model={**MODEL, **(model or {})}, **more
    )
    raw = made.model_dump(mode="json")
    raw["data"]["sequence_length"] = LENGTH
    raw["train"]["global_batch_size"] = BLOCKS
    raw["parallel"]["sequence_parallel_size"] = sp
    return validate(raw)


def assert_equal(found: list[dict], expected: dict, gradients: float = 1e-5) -> None:
    worst, where = difference(found, expected, "gradients")
    assert worst < gradients, (worst, where)
    worst, where = difference(found, expected, "weights")
    assert worst < 1e-5, (worst, where)
    for rank in found:
        for what in ("losses", "norms", "aux"):
            assert rank[what] == pytest.approx(expected[what], rel=1e-5), what


@pytest.mark.parametrize(
    ("kind", "stage"),
    dear(itertools.product(READERS, (1, 2, 3)), ("documents", 1), ("chat", 2), ("whole", 3), ("documents", 3)),
)
def test_two_ranks_that_share_sequences_equal_one_process(two_ranks, kind, stage):
    """With the experts shared out over the same two ranks."""
    expected = train_steps(layout(1, 1), STEPS, read=READERS[kind])
    assert_equal(
        two_ranks.run(_train, kind, layout(2, 2, ep=2, stage=stage), STEPS),
        expected,
    )


def _train(kind: str, cfg, steps: int) -> dict:
    return train_steps(cfg, steps, read=READERS[kind])


@pytest.mark.parametrize(
    ("sp", "ep", "stage", "kind", "window"),
    dear(
        [(2, 4, 1, "documents", None), (4, 2, 2, "chat", 5), (2, 2, 3, "documents", 5), (4, 4, 3, "whole", 7)],
        (4, 2, 2, "chat", 5),
    ),
)
def test_four_ranks_that_share_sequences_and_experts_equal_one_process(four_ranks, sp, ep, stage, kind, window):
    """Also with fewer key-value heads (2) than ranks, and windows that reach over the parts of a sequence."""
    model = {"sliding_window": window}
    expected = train_steps(layout(1, 1, model=model), STEPS, read=READERS[kind])
    assert_equal(four_ranks.run(_train, kind, layout(4, sp, ep=ep, stage=stage, model=model), STEPS), expected)


FEATURES = {
    "window": {"sliding_window": 5},
    "sequence balance": {"router_aux_loss_scope": "sequence"},
    "capacity": {"router": {"capacity_factor": 0.8, "overflow": "next"}},
    "capacity by choice": {"router": {"capacity_factor": 0.8, "capacity_order": "choice"}},
    "expert choice": {"router": {"type": "expert_choice"}},
    "batch prioritised": {"router": {"type": "batch_prioritised", "noise": False, "capacity_factor": 0.8}},
    "balanced": {"router": {"type": "balanced"}},
    "parts of tokens": {"router": {"type": "multi_head", "heads": 2, "capacity_factor": 0.8}},
    "tied": {"tie_word_embeddings": True},
    "norms of heads": {"qk_norm": "head"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_what_goes_by_whole_sequences_does_so_where_they_are_shared(two_ranks, feature):
    model = FEATURES[feature]
    expected = train_steps(layout(1, 1, model=model), 2, read=read_documents)
    assert_equal(two_ranks.run(_train, "documents", layout(2, 2, ep=2, model=model), 2), expected)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_and_several_micro_batches(two_ranks, kind):
    expected = train_steps(layout(1, 1, rounds=2), 2, read=read_documents)
    cfg = layout(2, 2, ep=2, stage=3, rounds=2, train={"activation_checkpointing": kind})
    assert_equal(two_ranks.run(_train, "documents", cfg, 2), expected)


def _heads(sp: int) -> None:
    from moe_llm.distributed.sequence import UlyssesParts

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parts = UlyssesParts(torch.distributed.group.WORLD, rank, world)
    for groups in (1, 2, 4, 8):
        whole = [
            torch.randn(2, h, 4 * world, 3, generator=torch.Generator().manual_seed(h)) for h in (8, groups, groups)
        ]
        q, k, v = parts.heads_for_positions(*(x[:, :, 4 * rank : 4 * rank + 4] for x in whole))
        own = range(rank * 8 // world, (rank + 1) * 8 // world)
        assert torch.equal(q, whole[0][:, own.start : own.stop])
        for mine, all_ in ((k, whole[1]), (v, whole[2])):
            for i, head in enumerate(own):  # the head that each query head reads
                assert torch.equal(mine[:, i * mine.shape[1] // len(own)], all_[:, head * groups // 8])
        assert torch.equal(parts.positions_for_heads(q), whole[0][:, :, 4 * rank : 4 * rank + 4])
        x = whole[0][:, 0] > 0
        assert torch.equal(parts.whole(x[:, 4 * rank : 4 * rank + 4]), x)


def test_a_rank_gets_its_heads_of_all_positions_and_its_positions_back(four_ranks):
    four_ranks.run(_start, layout(4, 4))
    four_ranks.run(_heads, 4)


def _start(cfg) -> None:
    from support.ranks import fresh_accelerate

    from moe_llm.distributed.runtime import start

    fresh_accelerate()
    start(cfg)


def _whole_run(config_path: str) -> list[dict]:
    from support.ranks import fresh_accelerate

    from moe_llm.config import load_config
    from moe_llm.train.metrics import read_metrics
    from moe_llm.train.run import train

    fresh_accelerate()
    cfg = load_config(config_path)
    train(cfg)
    return read_metrics(Path(cfg.run.dir) / "metrics.jsonl")


def test_a_whole_run_trains_and_evaluates_as_one_process_does(two_ranks_of_a_run, make_config):
    """Loader, evaluation, checkpoint; and goes on from there in the other layout."""
    common = {"train": {"max_steps": 4, "micro_batch_size": 2}, "evaluate": {"every_steps": 2, "max_blocks": 5}}
    expected = _whole_run(str(make_config("one", **common)))
    shared = {"sequence_parallel_size": 2, "expert_parallel_size": 2}
    found = two_ranks_of_a_run.run(_whole_run, str(make_config("shared", **common, parallel=shared)))
    for line, other in zip(expected, found[0], strict=True):
        for key in ("tokens", "loss", "aux_loss", "grad_norm", *(["val_loss"] if "val_loss" in line else [])):
            assert other[key] == pytest.approx(line[key], rel=1e-4), (line["step"], key)


def test_parts_of_blocks_are_blocks():
    """Training and held-out text alike; document lengths stay those of the whole."""
    source = blocks("documents")
    whole = ValidationBlocks([source]).batches(micro_batch_size=2)
    parts = [ValidationBlocks([source]).batches(micro_batch_size=2, part=(i, 3)) for i in range(3)]
    assert len(whole) == len(parts[0])
    for i, batch in enumerate(whole):
        cut = [part[i] for part in parts]
        assert torch.equal(torch.cat([part.input_ids_BS for part in cut], 1), batch.input_ids_BS)
        assert torch.equal(torch.cat([part.labels_BS for part in cut], 1), batch.labels_BS)
        assert all(part.runs_B == batch.runs_B for part in cut)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {"sequence_length": 25}}, "does not divide data.sequence_length=25"),
        ({"model": {"num_attention_heads": 3, "num_key_value_heads": 3}}, "does not spread 3 query heads"),
        (
            {"model": {"router": {"type": "lory", "segment_length": 4}, "num_experts_per_tok": 1}},
            "model.router.type=lory",
        ),
        ({"model": {"router_aux_loss_scope": "transformers"}}, "router_aux_loss_scope=transformers"),
        ({"train": {"adversarial": {"epsilon": 0.1}}}, "adversarial.epsilon=0.1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, sentence):
    raw = layout(2, 2).model_dump(mode="json")
    for section, values in changes.items():
        raw[section] |= values
    if "router" in changes.get("model", {}):
        raw["model"].pop("router_aux_loss_coef")
    with pytest.raises(UserError, match=sentence):
        validate(raw)


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="sequence_parallel_size=2 does not divide the number of launched ranks, 3"):
        layout(2, 2).check_layout(3)
    with pytest.raises(UserError, match=r"x 6 ranks / parallel\.sequence_parallel_size=2 = 12"):
        layout(2, 2).check_layout(6)

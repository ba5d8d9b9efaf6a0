"""`data.stages`: shares of the sources that change at given steps, and what is said of each source."""

import numpy as np
import pytest

from moe_llm.config.load import validate
from moe_llm.data.blocks import TrainBlocks, ValidationBlocks
from moe_llm.data.loader import TrainLoader
from moe_llm.data.order import PERIOD, Mixture, StagedMixture
from moe_llm.errors import UserError

STAGES = [(0, [1, 3, 0]), (500, [0, 0, 1]), (70_123, [2, 1, 1])]


def test_each_stage_has_its_shares_and_sources_go_on_where_they_were():
    source, nth = StagedMixture(STAGES, 5)(np.arange(200_000))
    for begin, end, weights in ((0, 500, [1, 3, 0]), (500, 70_123, [0, 0, 1]), (70_123, 200_000, [2, 1, 1])):
        counts = np.bincount(source[begin:end], minlength=3)
        assert np.abs(counts - np.array(weights) / sum(weights) * (end - begin)).max() < 8
        assert all(count == 0 for count, weight in zip(counts, weights) if not weight)
    for s in range(3):
        assert nth[source == s].tolist() == list(range((source == s).sum())), "no sample of a source is skipped"


def test_counts_are_those_of_the_samples():
    mixture = StagedMixture(STAGES, 5)
    source, _ = mixture(np.arange(150_000))
    for samples in (0, 1, 499, 500, 501, 65_536, 70_123, 70_124, 149_999):
        assert mixture.taken(samples).tolist() == np.bincount(source[:samples], minlength=3).tolist()


def test_one_stage_is_the_mixture_of_its_weights():
    position = np.arange(3 * PERIOD // 2)
    staged, plain = StagedMixture([(0, [0.2, 0.8])], 3)(position), Mixture([0.2, 0.8], 3)(position)
    assert all((a == b).all() for a, b in zip(staged, plain))


@pytest.fixture
def sources(random_blocks):
    return [
        random_blocks([9, 30, 4, 50], 8),
        random_blocks([20, 21], 8, first_id=1000),
        random_blocks([100], 8, first_id=5000),
    ]


def test_samples_are_the_same_for_any_number_of_ranks_and_after_a_resume(sources):
    def rows(world, micro, position, count):
        found = []
        blocks = TrainBlocks(sources, None, 7, stages=[(0, [1, 1, 0]), (24, [0, 1, 3])])
        loaders = [
            TrainLoader(
                blocks, position=position, global_batch_size=8, micro_batch_size=micro, rank=r, world_size=world
            )
            for r in range(world)
        ]
        for _ in range(count):
            step = [next(loader) for loader in loaders]
            found.append(sorted(tuple(row) for rank in step for b in rank for row in b.input_ids_BS.tolist()))
        for loader in loaders:
            loader.close()
        return found

    alone = rows(1, 8, 0, 7)
    assert rows(2, 2, 0, 7) == rows(4, 1, 0, 7) == alone
    assert rows(4, 2, 32, 3) == alone[4:]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 1.0]])
def test_progress_counts_what_has_been_read(sources, weights):
    blocks = TrainBlocks(sources, weights, 0)
    samples = 3 * len(blocks)
    source, block = blocks.locate(0, samples)
    tokens = [0, 0, 0]
    for s, b in zip(source, block):
        arrays = sources[s].empty_arrays(1)
        sources[s].write(int(b), 0, arrays)
        tokens[s] += int(arrays["attention_mask_BS"].sum())
    for s, found in enumerate(blocks.progress(samples)):
        assert found["epochs"] == pytest.approx((source == s).sum() / len(sources[s]))
        assert found["tokens"] == pytest.approx(tokens[s], abs=8)
    assert blocks.fill_of(samples) == pytest.approx(sum(tokens) / (8 * samples), abs=0.01)


def test_held_out_batches_by_source_hold_every_block_once(sources):
    held_out = ValidationBlocks(sources, None, ["a", "b", "c"])
    for world in (1, 3):
        found = [
            tuple(row)
            for rank in range(world)
            for batches in held_out.by_source(micro_batch_size=2, rank=rank, world_size=world).values()
            for batch in batches
            for row in batch.input_ids_BS.tolist()
            if set(row) != {2}
        ]
        expected = [
            tuple(row)
            for batch in held_out.batches(micro_batch_size=2)
            for row in batch.input_ids_BS.tolist()
            if set(row) != {2}
        ]
        assert sorted(found) == sorted(expected)


BASE = {"model": {"vocab_size": 300}, "train": {"max_steps": 9}}
TWO = [{"type": "files", "path": "a"}, {"type": "files", "path": "b"}]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"sources": TWO[:1], "stages": [{"weights": [1]}]}, r"data\.stages=.*mixes several sources"),
        ({"sources": TWO, "stages": [{"weights": [1]}]}, r"data\.stages\.0\.weights=.*are 1 shares for 2 sources"),
        ({"sources": TWO, "stages": [{"weights": [0, 0]}]}, r"data\.stages\.0\.weights=.*are no shares"),
        ({"sources": TWO, "stages": [{"weights": [1, -1]}]}, r"data\.stages\.0\.weights=.*are no shares"),
        (
            {"sources": TWO, "stages": [{"weights": [1, 2]}, {"weights": [2, 1]}]},
            r"data\.stages\.1\.from_step=0 is not behind",
        ),
        (
            {"sources": TWO, "stages": [{"from_step": 3, "weights": [1, 2]}]},
            r"data\.stages\.0\.from_step=3 leaves the steps before it",
        ),
        ({"sources": TWO, "stages": [{"weights": [1, 0]}]}, r"data\.sources\.1=.*has the share 0 in every stage"),
        (
            {"sources": [s | {"weight": 1} for s in TWO], "stages": [{"weights": [1, 1]}]},
            r"data\.sources\.0\.weight=1.0 has no effect",
        ),
    ],
)
def test_stages_that_say_nothing_or_too_much_are_refused(data, named):
    with pytest.raises(UserError, match=named):
        validate(BASE | {"data": data})

"""Order is a function of seed and index; ranks share it; position alone says where to go on."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_llm.data.blocks import TrainBlocks, ValidationBlocks, validation_batches
from moe_llm.data.cache import DocumentEncoder
from moe_llm.data.loader import TrainLoader, load_data, load_evaluation
from moe_llm.data.order import Mixture, drawn, permute, shuffled
from moe_llm.errors import UserError


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_every_epoch_is_a_permutation(length, seed, epoch):
    order = shuffled(np.arange(epoch * length, (epoch + 1) * length), length, seed, 0)
    assert sorted(order.tolist()) == list(range(length))


def test_permutations_look_random():
    n = 4096
    orders = [shuffled(np.arange(n), n, seed, stream) for seed in range(4) for stream in range(2)]
    orders.append(shuffled(np.arange(n, 2 * n), n, 0, 0))
    index = np.arange(n)
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(index, order)[0, 1]) < 0.06
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
        assert (np.diff(order) == 1).mean() < 0.005
        for other in orders[:i]:
            assert (order == other).sum() < 12  # 1 is expected by chance


def test_huge_corpora_need_no_memory():
    index = np.array([0, 1, 10**15 - 1])
    placed = permute(index, 10**15, np.full(3, 7, np.uint64))
    assert len(set(placed.tolist())) == 3
    assert ((placed >= 0) & (placed < 10**15)).all()


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.2, 0.1], [5, 1e-9, 3], [1] * 7])
def test_mixture_has_its_proportions_in_any_stretch(weights):
    mixture = Mixture(weights, seed=3)
    share = np.array(weights) / sum(weights)
    source, nth = mixture(np.arange(200_000))
    for begin, length in ((0, 200_000), (777, 1000), (65_000, 2000), (150_000, 100)):
        counts = np.bincount(source[begin : begin + length], minlength=len(weights))
        assert (np.abs(counts - share * length) < 4 + length * 2e-5).all()
    for s in range(len(weights)):
        assert nth[source == s].tolist() == list(range((source == s).sum())), "no block of a source is skipped"
    assert set(source.tolist()) == set(range(len(weights))), "even the smallest weight counts"


def key(batch):
    return [tuple(row) for row in batch.input_ids_BS.tolist()]


def train_blocks(random_blocks, weights=None, seed=0):
    sources = [
        random_blocks([9, 30, 4, 50], 8),
        random_blocks([20, 21], 8, first_id=1000),
        random_blocks([100], 8, first_id=5000),
    ]
    return TrainBlocks(sources, weights, seed)


def test_an_epoch_without_weights_is_every_block_once(random_blocks):
    blocks = train_blocks(random_blocks)
    everything = Counter((s, b) for s, source in enumerate(blocks.sources) for b in range(len(source)))
    first, second = (list(zip(*map(np.ndarray.tolist, blocks.locate(e * len(blocks), len(blocks))))) for e in (0, 1))
    assert Counter(first) == Counter(second) == everything
    assert first != second
    targets = blocks.rows(0, len(blocks)).num_targets
    assert targets == sum(source.text.targets for source in blocks.sources)


def test_a_bootstrap_draws_blocks_with_replacement_and_the_same_ones_in_every_epoch(random_blocks):
    plain = train_blocks(random_blocks)
    size, drawn = len(plain), {}
    for seed in (0, 1, None):
        blocks = TrainBlocks(plain.sources, None, 0, seed)
        epochs = [sorted(zip(*map(list, blocks.locate(start, size)))) for start in (0, size)]
        assert epochs[0] == epochs[1]
        drawn[seed] = epochs[0]
    assert len(set(drawn[None])) == size
    assert len(set(drawn[0])) < size
    assert drawn[0] != drawn[1]
    weighted = TrainBlocks(plain.sources, [1.0] * len(plain.sources), 0, 0)
    assert len(set(zip(*map(list, weighted.locate(0, size))))) < size


def test_a_large_bootstrap_leaves_out_as_many_as_chance_does():
    """1/e of them (Breiman 1996), by another draw for each seed and stream."""
    index = np.arange(20000)
    left_out = 1 - len(np.unique(drawn(index, 20000, 3, 0))) / 20000
    assert left_out == pytest.approx(np.exp(-1), abs=0.01)
    assert (drawn(index, 20000, 3, 0) == drawn(index, 20000, 4, 0)).mean() < 0.01
    assert (drawn(index, 20000, 3, 0) == drawn(index, 20000, 3, 1)).mean() < 0.01


def test_weighted_sources_each_go_through_their_own_epochs(random_blocks):
    blocks = train_blocks(random_blocks, weights=[1, 2, 1])
    source, block = blocks.locate(0, 4000)
    for s, packed in enumerate(blocks.sources):
        own, n = block[source == s], len(packed)
        assert abs(len(own) - 4000 * [0.25, 0.5, 0.25][s]) < 5
        for epoch in range(3):
            assert sorted(own[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.integers(1, 20), st.sampled_from([None, [3, 1, 2]]))
def test_rows_do_not_depend_on_how_they_are_asked_for(random_blocks, start, count, weights):
    blocks = train_blocks(random_blocks, weights)
    assert key(blocks.rows(start, count)) == [key(blocks.rows(start + i, 1))[0] for i in range(count)]
    assert key(train_blocks(random_blocks, weights).rows(start, count)) == key(blocks.rows(start, count))


def test_the_seed_changes_the_order(random_blocks):
    assert key(train_blocks(random_blocks, seed=0).rows(0, 20)) != key(train_blocks(random_blocks, seed=1).rows(0, 20))


def steps(blocks, count, **layout):
    with TrainLoader(blocks, **layout) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_together_are_one_process(random_blocks, world_size, micro):
    blocks = train_blocks(random_blocks)
    alone = steps(blocks, 3, position=16, global_batch_size=16, micro_batch_size=micro * world_size)
    ranks = [
        steps(
            blocks,
            3,
            position=16,
            global_batch_size=16,
            micro_batch_size=micro,
            rank=r,
            world_size=world_size,
        )
        for r in range(world_size)
    ]
    for s, step in enumerate(alone):
        assert len(step) == 16 // (micro * world_size)
        for j, batch in enumerate(step):
            assert key(batch) == [row for rank in ranks for row in key(rank[s][j])]
        assert [row for batch in step for row in key(batch)] == key(blocks.rows(16 + 16 * s, 16))


def test_position_goes_on_with_another_number_of_ranks(random_blocks):
    blocks = train_blocks(random_blocks)
    seen, position = [], 0
    for world_size, micro, count in ((1, 8, 2), (4, 1, 3), (2, 2, 1), (1, 4, 2)):
        loaders = [
            TrainLoader(
                blocks,
                position=position,
                global_batch_size=8,
                micro_batch_size=micro,
                rank=r,
                world_size=world_size,
            )
            for r in range(world_size)
        ]
        for _ in range(count):
            taken = [next(loader) for loader in loaders]
            seen += [row for j in range(len(taken[0])) for rank in taken for row in key(rank[j])]
        position = loaders[0].position
        for loader in loaders:
            loader.close()
    assert position == 64
    assert seen == key(blocks.rows(0, 64)), "no sample lost, none repeated, prefetched ones included"


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_prefetching_changes_nothing_and_ends_cleanly(random_blocks, prefetch):
    blocks = train_blocks(random_blocks)
    before = threading.active_count()
    got = steps(blocks, 4, position=0, global_batch_size=4, micro_batch_size=4, prefetch=prefetch)
    assert [row for step in got for row in key(step[0])] == key(blocks.rows(0, 16))
    assert threading.active_count() == before


def test_a_closed_loader_ends_and_an_error_reaches_the_caller(random_blocks):
    blocks = train_blocks(random_blocks)
    loader = TrainLoader(blocks, position=0, global_batch_size=4, micro_batch_size=4)
    loader.close()
    assert list(loader) == []

    def broken(start, count):
        if start >= 8:
            raise OSError("disk gone")
        return original(start, count)

    original, blocks.rows = blocks.rows, broken
    with TrainLoader(blocks, position=0, global_batch_size=4, micro_batch_size=4) as loader:
        next(loader)
        next(loader)
        with pytest.raises(OSError, match="disk gone"):
            next(loader)


def test_reading_ahead_happens_off_the_callers_thread(random_blocks):
    blocks = train_blocks(random_blocks)
    readers, original = set(), blocks.rows
    blocks.rows = lambda *a: (readers.add(threading.current_thread().name), original(*a))[1]
    with TrainLoader(blocks, position=0, global_batch_size=4, micro_batch_size=4, prefetch=2) as loader:
        deadline = time.time() + 20
        while loader._queue.qsize() < 2 and time.time() < deadline:
            time.sleep(0.005)
        assert loader._queue.qsize() == 2
        assert loader.position == 0, "what is only read ahead does not count as consumed"
    assert threading.current_thread().name not in readers


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("max_blocks", [None, 5, 1000])
def test_ranks_share_validation_evenly(random_blocks, world_size, max_blocks):
    sources = [random_blocks([9, 30, 4, 50], 8), random_blocks([20, 21], 8, first_id=1000)]
    validation = ValidationBlocks(sources, max_blocks)
    total = sum(map(len, sources))
    assert len(validation) == min(max_blocks or total, total)
    ranks = [
        validation_batches(validation, micro_batch_size=2, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.input_ids_BS.shape == (2, 8) for batches in ranks for batch in batches)
    assert sum(batch.num_targets for batches in ranks for batch in batches) == validation.num_targets
    rows = Counter(row for batches in ranks for batch in batches for row in key(batch) if set(row) != {2})
    assert set(rows.values()) == {1}
    assert len(rows) == len(validation)


def test_bits_per_byte(random_blocks):
    source = random_blocks([10, 20], 8)
    validation = ValidationBlocks([source])
    assert validation.bytes_per_token == pytest.approx(90 / 32)  # 3 bytes a token, and an eos for each document
    assert validation.bits_per_byte(float(np.log(2)) * 90 / 32) == pytest.approx(1.0)
    part = ValidationBlocks([source], max_blocks=2)
    assert part.bytes_per_token == pytest.approx(sum(source.bytes_of(b) for _, b in part.blocks) / part.num_targets)


def corpus(tmp_path, make_text, name, count, offset=0):
    (tmp_path / name).mkdir()
    for i in range(count):
        (tmp_path / name / f"{i:02}.txt").write_text(make_text(offset + i), encoding="utf-8")
    return {"type": "files", "path": str(tmp_path / name / "*.txt")}


def test_load_data_end_to_end(make_config, tokenizer, make_text, tmp_path):
    a, b = corpus(tmp_path, make_text, "a", 30), corpus(tmp_path, make_text, "b", 10, 100)
    config = make_config([a, b], data={"sources": [a, b], "validation_fraction": 0.1})
    data = load_data(config, tokenizer, show_progress=False)
    again = load_data(config, tokenizer, rank=1, world_size=2)
    assert key(again.train.rows(0, 50)) == key(data.train.rows(0, 50))
    texts = [p.read_text() for n in "ab" for p in sorted((tmp_path / n).iterdir())]
    assert sum(s.documents for s in data.statistics) == 40
    assert sum(s.bytes for s in data.statistics) == sum(len(t.encode()) for t in texts)
    assert sum(s.blocks for s in data.statistics if s.split == "train") == len(data.train)
    held = sum(s.bytes for s in data.statistics if s.split == "validation")
    assert data.validation.bytes_per_token == held / data.validation.num_targets
    assert {(s.name, s.split) for s in data.statistics} == {
        (f"data.sources.{i}", split) for i in range(2) for split in ("train", "validation")
    }


@pytest.mark.parametrize(("begin", "told"), [(4, False), (5, True)])
def test_a_stage_behind_the_end_of_the_run_is_reported(
    make_config, tokenizer, make_text, tmp_path, caplog, begin, told
):
    sources = []
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(make_text(number, 400))
        sources.append({"type": "files", "path": str(tmp_path / f"{number}.txt")})
    stages = [{"weights": [1, 1]}, {"from_step": begin, "weights": [1, 0]}]
    load_data(make_config(sources, data={"stages": stages}, train={"max_steps": 5}), tokenizer, show_progress=False)
    assert (f"data.stages.1.from_step={begin} is not reached: the run has 5 steps" in caplog.text) == told


def test_data_bootstrap_seed_resamples_the_blocks_of_training_alone(make_config, tokenizer, make_text, tmp_path):
    a = corpus(tmp_path, make_text, "a", 30)
    found = {}
    for seed in (None, 1, 2):
        more = {} if seed is None else {"bootstrap_seed": seed}
        data = load_data(make_config([a], data={"sources": [a], "validation_fraction": 0.1, **more}), tokenizer)
        found[seed] = sorted(data.train.locate(0, len(data.train))[1].tolist()), data.validation.num_targets
    whole = list(range(len(found[None][0])))
    assert found[None][0] == whole
    assert set(found[1][0]) < set(whole)
    assert found[1][0] != found[2][0]
    assert len({targets for _, targets in found.values()}) == 1


def documents_of(blocks, tokenizer):
    ids = np.concatenate([source.text.tokens_N for source in blocks.sources]).tolist()
    return set(tokenizer.decode(ids).split("</s>"))


def test_validation_text_never_occurs_in_training(make_config, tokenizer, make_text, tmp_path):
    a, b = corpus(tmp_path, make_text, "a", 30), corpus(tmp_path, make_text, "b", 30, 15)  # half in common
    for extra in (
        {"sources": [a, b], "validation_fraction": 0.3},
        {"sources": [a], "validation_sources": [b]},
    ):
        data = load_data(make_config([a], data=extra), tokenizer)
        train, held = (
            documents_of(data.train, tokenizer) - {""},
            documents_of(data.validation, tokenizer) - {""},
        )
        assert len(train) >= 15
        assert len(held) >= 5
        assert not train & held


def test_a_single_file_is_enough(make_config, tokenizer, make_text, tmp_path):
    (tmp_path / "book.txt").write_text("".join(make_text(i) for i in range(50)), encoding="utf-8")
    source = {"type": "files", "path": str(tmp_path / "book.txt")}
    config = make_config([source], data={"sources": [source], "validation_fraction": 0.1})
    data = load_data(config, tokenizer)
    train, held = (
        tokenizer.decode(blocks.sources[0].text.tokens_N[1:-1].tolist()) for blocks in (data.train, data.validation)
    )
    assert train + held == (tmp_path / "book.txt").read_text(encoding="utf-8")
    assert 0.05 < len(held) / (len(train) + len(held)) < 0.15


def test_a_source_with_nothing_left_is_one_sentence(make_config, tokenizer, make_text, tmp_path):
    a = corpus(tmp_path, make_text, "a", 3)
    with pytest.raises(UserError, match=r"^data\.sources\.0 has no text left to train on"):
        load_data(make_config([a], data={"sources": [a], "validation_sources": [a]}), tokenizer)


def test_evaluation_of_any_files_counts_bytes_exactly(tokenizer, make_text, tmp_path):
    corpus(tmp_path, make_text, "a", 5)
    texts = [p.read_text(encoding="utf-8") for p in sorted((tmp_path / "a").iterdir())]
    evaluation = load_evaluation(str(tmp_path / "a" / "*.txt"), tokenizer, sequence_length=16)
    encoder = DocumentEncoder(tokenizer)
    assert evaluation.num_targets == sum(len(encoder.encode([t])[0]) - 1 for t in texts)
    assert evaluation.bytes_per_token == sum(len(t.encode()) for t in texts) / evaluation.num_targets
    labels = torch.cat([b.labels_BS[b.labels_BS >= 0] for b in evaluation.batches(micro_batch_size=3)])
    assert labels.tolist() == [i for t in texts for i in encoder.encode([t])[0].tolist()[1:]]
    with pytest.raises(UserError, match=r"^--data=.* does not exist"):
        load_evaluation(str(tmp_path / "none.txt"), tokenizer, sequence_length=16)

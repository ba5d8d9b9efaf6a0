"""Ranks answer, and when one does not, everybody hears why."""

import os
import tempfile
import time

import pytest

from moe_llm.doctor.ranks import LocalRanks, RankError


def rank_and_size():
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def misbehave(how: dict[int, str]):
    """What each rank does: nothing, raise, end or hang."""
    rank = int(os.environ["RANK"])
    match how.get(rank):
        case "raise":
            raise ValueError(f"rank {rank} does not like it")
        case "lose":
            raise RuntimeError("Connection closed by peer")
        case "end":
            os._exit(9)
        case "hang":
            time.sleep(60)
    return rank


@pytest.fixture(scope="module")
def ranks():
    with LocalRanks(2, timeout=60) as ranks:
        yield ranks


def test_every_rank_answers_in_order(ranks):
    assert ranks.run(rank_and_size) == [(0, 2), (1, 2)]


def test_ranks_that_end_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with LocalRanks(2) as ranks:
        ranks.run(rank_and_size)
        assert list(tmp_path.iterdir())
        processes = list(ranks._processes)
    assert list(tmp_path.iterdir()) == []
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_rank_at_work_for_nobody_is_ended(ranks):
    ranks.settle()
    before = ranks.run(os.getpid)
    ranks.settle()
    assert ranks.run(os.getpid) == before, "ranks at rest stay"
    ranks.send(misbehave, {0: "hang"})
    processes = list(ranks._processes)
    ranks.settle()
    assert not any(process.is_alive() for process in processes)
    assert ranks.run(rank_and_size) == [(0, 2), (1, 2)]


def test_a_rank_that_died_at_rest_is_named(ranks):
    ranks.run(rank_and_size)
    ranks._processes[1].kill()
    ranks._processes[1].join()
    with pytest.raises(RankError) as error:
        ranks.run(rank_and_size)
    assert error.value.message == "rank 1 ended with exit code -9"


def test_processes_stay_where_all_have_raised(ranks):
    ranks.run(rank_and_size)
    before = [process.pid for process in ranks._processes]
    with pytest.raises(RankError, match="does not like it"):
        ranks.run(misbehave, {0: "raise", 1: "raise"})
    assert [process.pid for process in ranks._processes] == before
    assert ranks.run(misbehave, {}) == [0, 1]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({0: "lose", 1: "end"}, "rank 1 ended with exit code 9"),
        ({0: "lose", 1: "raise"}, "rank 1: ValueError: rank 1 does not like it"),
        ({0: "raise", 1: "hang"}, "rank 0: ValueError: rank 0 does not like it"),
    ],
)
def test_the_rank_that_is_the_reason_is_named(ranks, how, message):
    with pytest.raises(RankError) as error:
        ranks.run(misbehave, how)
    assert error.value.message == message


def test_silence_is_told_and_ended(ranks):
    ranks.run(rank_and_size)
    timeout, ranks.timeout = ranks.timeout, 1
    with pytest.raises(RankError, match=r"ranks \[1\] gave no answer in 1 s"):
        ranks.run(misbehave, {1: "hang"})
    ranks.timeout = timeout
    assert ranks._processes == []

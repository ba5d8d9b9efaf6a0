"""Where a step's memory comes from changes no number, and what is kept for the next step is no more than steps need."""

import pytest
from support.runs import timeless

from moe_llm.ops import caching_allocator


def test_a_run_is_the_same_without_the_allocator(train, monkeypatch):
    own = train("own")
    monkeypatch.setattr(caching_allocator, "start", lambda: False)
    assert timeless(own) == timeless(train("plain"))


def test_what_loading_evaluating_and_saving_took_is_not_kept(train, monkeypatch):
    if not caching_allocator.start():
        pytest.skip("no Linux, or no compiler")
    caching_allocator.stop()
    reached, empty = [], caching_allocator.empty_cache

    def emptied():
        reached.append(caching_allocator.bytes_reached())
        empty()

    monkeypatch.setattr(caching_allocator, "empty_cache", emptied)
    train("run", checkpoint={"every_steps": 3}, evaluate={"every_steps": 2})
    assert len(reached) == 1 + 3 + 2 + 1  # after loading, steps 2, 4 and 6, steps 3 and 6, and when the run is over
    assert max(reached) > 2**20

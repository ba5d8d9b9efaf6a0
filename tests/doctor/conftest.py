"""Ranks that stay up over the doctor's tests."""

import pytest


@pytest.fixture(scope="session")
def doctor_ranks():
    from moe_llm.doctor.ranks import LocalRanks

    with LocalRanks(2, timeout=300) as ranks:
        yield ranks

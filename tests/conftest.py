"""Fixtures that several directories share."""

import pytest


@pytest.fixture(scope="session")
def two_ranks():
    from support.ranks import Ranks

    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks():
    from support.ranks import Ranks

    ranks = Ranks(4)
    yield ranks
    ranks.close()

"""Fixtures that several directories share."""

import os
import tempfile

import hypothesis
import pytest

# The same examples every time, so that a change is judged by itself; HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# transformers copies the code beside a checkpoint's weights there before it imports it
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="modules-"))


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

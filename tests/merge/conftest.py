"""A small tokenizer of whole words, where a test of merging needs one."""

import pytest
from merge_fakes import Words


@pytest.fixture
def words() -> Words:
    return Words()

"""Counts and measures of routing against tables done by hand."""

import numpy as np
import pytest

from moe_llm.inspect.counts import MAX_UNITS, RoutingCounts
from moe_llm.inspect.measures import (
    agreement,
    co_selection,
    mutual_information,
    repetition,
    shares,
    specialisation,
    top_tokens,
)

# one document of five tokens, two layers, four experts, two choices each
CHOICES = np.array(
    [
        [[0, 1], [0, 2], [2, 0], [3, 1], [3, 1]],
        [[1, 0], [1, 0], [1, 2], [2, 3], [0, 3]],
    ]
)
IDS = np.array([5, 5, 6, 7, 7])


def counted(**more) -> RoutingCounts:
    counts = RoutingCounts(layers=2, experts=4, top_k=2, vocabulary=9, sources=more.pop("sources", 1))
    counts.add(CHOICES, IDS, 0)
    return counts


def test_repetition_by_hand():
    found = repetition(counted())
    # layer 0: first choices 0 0 2 3 3; sets 01 02 20 31 31, of which 02|31 has nothing in common
    assert found["first"] == [2 / 4, 2 / 4]
    assert found["first_or_second"] == [3 / 4, 4 / 4]
    assert repetition(RoutingCounts(1, 8, 2, 3, 1))["chance_first_or_second"] == pytest.approx(1 - 6 / 8 * 5 / 7)
    assert repetition(RoutingCounts(1, 8, 2, 3, 1))["chance_first"] == 1 / 8


def test_repetition_does_not_cross_documents():
    counts = counted()
    counts.add(CHOICES[:, ::-1], IDS[::-1], 0)
    assert counts.consecutive_S.tolist() == [8]
    assert repetition(counts)["first"] == [2 / 4, 2 / 4]


def test_co_selection_by_hand():
    found = co_selection(counted())
    assert found["tokens"][0] == [[0, 1, 2, 0], [1, 0, 0, 2], [2, 0, 0, 0], [0, 2, 0, 0]]
    # loads 3 3 2 2: pairs 9 6 6 6 6 4, in all 37, over which five tokens are spread
    assert found["over_independent"][0][1][3] == pytest.approx(2 / (5 * 6 / 37))
    assert found["over_independent"][0][0][0] == 0


def test_independent_choices_are_chosen_together_as_often_as_expected():
    random = np.random.default_rng(0)
    choices = np.array([random.permutation(6)[:2] for _ in range(20000)])[None]
    counts = RoutingCounts(1, 6, 2, 3, 1)
    counts.add(choices, np.zeros(20000, int), 0)
    ratio = np.array(co_selection(counts)["over_independent"][0])
    assert ratio[~np.eye(6, dtype=bool)] == pytest.approx(1, abs=0.1)


def test_agreement_by_hand():
    found = agreement(counted())
    # first choices 0 0 2 3 3 and 1 1 1 2 0
    assert found["same_index"] == [0]
    assert found["same_index_chance"] == [pytest.approx(2 / 5 * 1 / 5 + 1 / 5 * 1 / 5)]
    identical = RoutingCounts(2, 4, 2, 9, 1)
    identical.add(CHOICES[[0, 0]], IDS, 0)
    assert agreement(identical)["same_index"] == [1]
    assert agreement(identical)["bits"] == [pytest.approx(-0.8 * np.log2(0.4) - 0.2 * np.log2(0.2))]


def test_top_tokens_and_positions_by_hand():
    counts = counted()
    best = top_tokens(counts, str)[0]
    assert [(t["id"], t["count"], t["share"]) for t in best[0]] == [(5, 2, 1.0), (6, 1, 1.0)]
    assert [(t["text"], t["count"]) for t in best[3]] == [("7", 2)]
    # positions 0 | 1 | 2 3 | 4
    assert shares(counts)["tokens_by_position"][:5] == [1, 1, 2, 1, 0]
    assert shares(counts)["load"][0] == [0.3, 0.3, 0.2, 0.2]


def test_mutual_information():
    assert mutual_information(np.array([[3, 0], [0, 3]])) == pytest.approx(1)
    assert mutual_information(np.array([[2, 4], [1, 2]])) == pytest.approx(0)
    assert mutual_information(np.zeros((2, 2))) == 0


def dealt(seed: int, planted: bool, documents: int = 60) -> RoutingCounts:
    """Documents that each prefer an expert, drawn by chance or, planted, by their source."""
    random = np.random.default_rng(seed)
    counts = RoutingCounts(1, 4, 1, 1, 2)
    for index in range(documents):
        favourite = index % 2 if planted else random.integers(4)
        choices = np.where(random.random(40) < 0.8, favourite, random.integers(4, size=40))
        counts.add(choices[None, :, None], np.zeros(40, int), index % 2)
    return counts


def test_a_planted_specialisation_is_found_and_documents_of_their_own_are_none():
    assert specialisation(dealt(0, planted=True))["overall_p_value"] == 0.001
    values = [specialisation(dealt(seed, planted=False), 199)["overall_p_value"] for seed in range(20)]
    # permuting tokens instead of documents would find every one of them
    assert 0.3 < np.mean(values) < 0.7
    assert min(values) > 0.005


def test_one_source_is_nothing_to_specialise_on():
    assert specialisation(counted()) is None


def test_what_the_vocabulary_explains():
    counts = RoutingCounts(1, 2, 1, 2, 2)
    for source in (0, 1) * 8:
        counts.add(np.full((1, 10, 1), source), np.full(10, source), source)
    found = specialisation(counts)
    assert found["bits"] == [pytest.approx(1)]
    assert found["by_tokens"] == [pytest.approx(1)]
    same = RoutingCounts(1, 2, 1, 2, 2)
    for source in (0, 1) * 8:
        same.add(np.full((1, 10, 1), source), np.zeros(10, int), source)
    assert specialisation(same)["by_tokens"] == [pytest.approx(0)]


def test_what_is_held_does_not_grow_with_the_text():
    counts = RoutingCounts(1, 2, 1, 2, 2)
    rows = 3 * MAX_UNITS + 7
    for index in range(rows):
        counts.add(np.array([[[index % 2]]]), np.array([0]), int(index % 3 == 0))
    assert len(counts.units) <= MAX_UNITS
    assert counts.unit_rows >= 4
    whole = sum(counts.units) + sum(held for held, _ in counts._open.values())
    assert whole.sum() == rows == counts.sources_LES.sum()
    assert all(unit.sum() == counts.unit_rows for unit in counts.units)

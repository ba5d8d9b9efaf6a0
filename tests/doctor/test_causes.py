"""What a pattern of failures is put down to."""

import pytest

from moe_llm.doctor.causes import diagnose
from moe_llm.doctor.findings import within


@pytest.mark.parametrize(
    ("beyond", "padded", "full", "cause"),
    [
        (["step 2"], ["step 2"], ["step 1"], "padding is counted as tokens"),
        (["step 1"], ["step 1"], ["step 2"], "padding is counted as tokens"),
        (["step 1", "step 2"], ["step 2"], ["step 1"], "the balance loss has another formula"),
        (["step 1", "step 2"], ["step 1"], ["step 2"], "the balance loss has another formula"),
        (["step 1"], [], ["step 1", "step 2"], "the balance loss has another formula"),
        (["step 1", "step 2"], ["step 1", "step 2"], [], "or the formula is another: every step has padding"),
    ],
)
def test_padding_is_blamed_only_where_steps_without_it_are_right(beyond, padded, full, cause):
    steps = sorted({*padded, *full})
    finding = within(
        "reference_aux",
        "balance loss",
        [(float(step in beyond), 0.5, step) for step in steps],
        padded=padded,
        full=full,
    )
    diagnose([finding], ranks=2)
    assert cause in finding.cause

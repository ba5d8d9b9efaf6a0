"""Switches of the train section that change how a step is computed, not what."""

import pytest
import torch
from support.training import config

from moe_llm.distributed.runtime import make_deterministic
from moe_llm.errors import UserError


@pytest.mark.parametrize(
    ("given", "kind"), [(True, "full"), (False, "off"), ("selective", "selective"), ("full", "full")]
)
def test_recomputation_may_be_a_kind_or_a_switch(given, kind):
    train = config(1, 1, 1, train={"activation_checkpointing": given}).train
    assert train.activation_checkpointing == kind
    assert train.recomputes == (kind != "off")


def test_an_unknown_kind_of_recomputation_is_refused():
    with pytest.raises(UserError, match=r"train\.activation_checkpointing"):
        config(1, 1, 1, train={"activation_checkpointing": "some"})


def test_deterministic_training_sets_what_cuda_needs(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        import os

        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_asks_for_it_only_where_it_is_configured(train, monkeypatch):
    asked = []
    monkeypatch.setattr("moe_llm.distributed.runtime.make_deterministic", lambda: asked.append(True))
    train("plain")
    assert not asked
    train("deterministic", train={"deterministic": True})
    assert asked == [True]

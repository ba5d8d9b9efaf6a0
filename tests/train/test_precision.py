"""Where bf16 is emulated, a run that names no precision takes fp32, and one that asks for bf16 is told what it costs."""

import pytest
from support.training import config

from moe_llm import cli
from moe_llm.ops import native
from moe_llm.train.precision import settle_precision

LAPTOP, SERVER = {"sse4_2", "avx2", "fma"}, {"avx2", "avx512f", "avx512_bf16"}


def settled(monkeypatch, processor, precision=None):
    monkeypatch.setattr(native, "instructions", lambda: processor)
    asked = config(1, 1, 1)
    train = asked.train.model_dump(exclude={"precision"}, exclude_unset=True)
    given = asked.model_validate(
        asked.model_dump(exclude_unset=True) | {"train": train | ({"precision": precision} if precision else {})}
    )
    said: list[str] = []
    return settle_precision(given, said.append).train.precision, said


def test_a_laptop_takes_fp32_and_says_so(monkeypatch):
    precision, said = settled(monkeypatch, LAPTOP)
    assert precision == "fp32"
    assert "emulates bf16" in said[0]


@pytest.mark.parametrize("processor", [SERVER, {"amx_bf16"}, set()])
def test_a_processor_with_bf16_or_an_unknown_one_takes_bf16(monkeypatch, processor):
    assert settled(monkeypatch, processor) == ("bf16", [])


def test_bf16_that_is_asked_for_stays_and_is_told_its_price(monkeypatch):
    precision, said = settled(monkeypatch, LAPTOP, "bf16")
    assert precision == "bf16"
    assert "train.precision=fp32 is faster" in said[0]


def test_fp32_that_is_asked_for_needs_no_word(monkeypatch):
    assert settled(monkeypatch, LAPTOP, "fp32") == ("fp32", [])


def test_a_run_records_what_it_took(train, monkeypatch, capsys):
    monkeypatch.setattr(native, "instructions", lambda: LAPTOP)
    run = train("laptop", train={"precision": "bf16"})
    assert "emulates bf16" in capsys.readouterr().err
    assert run


def test_a_refusal_is_one_sentence_there_too(make_config, monkeypatch, capsys):
    monkeypatch.setattr(native, "instructions", lambda: LAPTOP)
    config = make_config(train={"precision": "bf16"}, finetune={"trainable": ["no.such.part"]})
    assert cli.main(["train", str(config)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no.such.part" in told

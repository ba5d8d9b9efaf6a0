"""The page of guarantees names tests that exist, and pictures are those of the code."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from moe_llm.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/developer/guarantees.md").read_text(encoding="utf-8")


def test_every_guarantee_names_tests_that_exist():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert files, row
        for name in files:
            assert (ROOT / name).is_file(), name
            assert re.search(r"^def test_", (ROOT / name).read_text(encoding="utf-8"), re.M), name


@pytest.fixture(scope="module")
def pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield import_module("pictures")


def words(name: str) -> str:
    return (ROOT / "docs/images" / name).read_text(encoding="utf-8")


def test_the_picture_of_the_code_has_every_layer(pictures):
    shown = re.findall(r">([^<>]+)</text>", words("architecture.svg"))
    assert [layer for layer in pictures.layers() if layer not in shown] == [], "run: python scripts/pictures.py"
    assert set(pictures.STEP) <= set(pictures.layers())


def test_the_picture_of_the_plan_has_its_numbers(pictures, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *pictures.PLAN, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["best"]["memory"]
    pictures.plan().savefig(tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    for name, value in memory.items():
        if name not in ("total", "when") and value:
            part = name.replace("_", " ")
            assert f"{part} {value / 2**30:.1f}" in drawn
            assert f">{part} " in words("plan.svg"), "run: python scripts/pictures.py"

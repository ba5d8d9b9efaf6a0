"""The generated pages are what the code says, and complete."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

import moe_llm

ROOT = Path(__file__).parents[2]
NOT_VARIABLES = {"AVX512", "NCCL", "HWC"}  # constants of the same form in files that read the environment


@pytest.fixture(scope="module")
def reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield import_module("reference")


def test_generated_pages_equal_what_the_script_writes(reference):
    for page, text in reference.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run python scripts/reference.py"


def test_a_page_that_is_out_of_date_is_noticed(reference):
    page = f"before\n{reference.START}old\n{reference.END}after\n"
    assert reference._updated(page, "new") == f"before\n{reference.START}\nnew\n{reference.END}after\n"


def test_the_python_page_has_every_public_name():
    text = (ROOT / "docs/reference/python-api.md").read_text(encoding="utf-8")
    assert [name for name in moe_llm.__all__ if f"### `moe_llm.{name}`" not in text] == []


def variables_in(source: str) -> set[str]:
    """Names that look like variables of the environment, where a file reads any."""
    if "environ" not in source:
        return set()
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {text for text in constants if isinstance(text, str) and re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", text)}


def test_the_environment_page_has_every_variable_that_the_package_reads(reference):
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "moe_llm").rglob("*.py")]
    found = set().union(*map(variables_in, sources)) - NOT_VARIABLES
    assert len(found) > 20
    documented = {name for group in reference.ENVIRONMENT.values() for name in group}

    def is_prefix(name: str) -> bool:
        return name.endswith("_") and (any(known.startswith(name) for known in documented) or name in PREFIXES)

    assert sorted(name for name in found - documented if not is_prefix(name)) == []


PREFIXES = {"GROUP_", "ROLE_"}  # of torch's launcher, whose variables the doctor hides from its ranks


def test_every_allowed_library_has_its_line(reference):
    text = reference.support_matrix()
    assert all(f"| {name} |" in text for name in reference.USES)

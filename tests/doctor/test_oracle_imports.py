"""The oracle is independent: it imports nothing of what it judges."""

import ast
from pathlib import Path

import moe_llm.doctor.oracle

ALLOWED = ("moe_llm.config", "moe_llm.doctor.oracle")
FILES = sorted(Path(moe_llm.doctor.oracle.__file__).parent.glob("*.py"))


def imported(file: Path) -> set[str]:
    """Modules that a file imports while it runs; what stands under `if TYPE_CHECKING` is for readers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_the_oracle_imports_nothing_of_the_package_but_the_configuration():
    assert len(FILES) > 5
    for file in FILES:
        own = {name for name in imported(file) if name.startswith(("moe_llm", "."))}
        assert all(name.startswith(ALLOWED) for name in own), (file.name, own)


def test_each_subject_is_short_enough_to_be_read():
    assert all(len(file.read_text().splitlines()) <= 250 for file in FILES)

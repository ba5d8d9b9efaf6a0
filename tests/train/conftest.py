"""Runs that several tests look at; each costs a second, so each is made once."""

from pathlib import Path

import pytest
from support import runs

from moe_llm.cli import main


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("corpus") / "text.txt")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Shared by all runs here: the text is tokenised once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_config(corpus, cache, tmp_path):
    """Path of a YAML file whose run goes to tmp_path/run; sections are merged in."""

    def make(name: str = "run", **changes) -> Path:
        return runs.write_yaml(tmp_path / f"{name}.yaml", runs.sections(corpus, cache, tmp_path / name, **changes))

    return make


@pytest.fixture
def train(make_config, tmp_path):
    """Train in this process and return the run directory."""

    def run(name: str = "run", **changes) -> Path:
        assert main(["train", str(make_config(name, **changes))]) == 0
        return tmp_path / name

    return run


@pytest.fixture(scope="session")
def finished_run(corpus, cache, tmp_path_factory) -> Path:
    """A run of 6 steps, saved at 3 and 6, evaluated at 2, 4 and 6. To look at, or to copy: not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    raw = runs.sections(corpus, cache, root / "run", evaluate={"every_steps": 2, "max_blocks": 4})
    assert main(["train", str(runs.write_yaml(root / "finished.yaml", raw))]) == 0
    return root / "run"


@pytest.fixture
def held(finished_run, tmp_path) -> Path:
    """A finished run of its own, with the configuration that made it; to be refused, and left as it is."""
    copy = runs.copy_run(finished_run, tmp_path / "held/run")
    text = (copy / "config.yaml").read_text().replace(str(finished_run), str(copy))
    (copy / "config.yaml").write_text(text)
    (tmp_path / "held/held.yaml").write_text(text)
    return copy

"""Fixtures that several directories share."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from support import runs

from moe_llm.logs import show_messages

# The same examples every time, so that a change is judged by itself; HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# transformers copies the code beside a checkpoint's weights there before it imports it
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def messages_on_stderr():
    """As the command line shows them, whatever ran before in this process."""
    show_messages(command=True)


@pytest.fixture(scope="session")
def two_ranks():
    from support.ranks import Ranks

    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture
def two_ranks_of_a_run():
    """Two ranks for one test: a whole run ends by taking down the process group, which others would still need."""
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


# Runs that several tests look at; each costs a second, so each is made once.


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
        from moe_llm.cli import main

        assert main(["train", str(make_config(name, **changes))]) == 0
        return tmp_path / name

    return run


@pytest.fixture(scope="session")
def finished_run(corpus, cache, tmp_path_factory) -> Path:
    """A run of 6 steps, saved at 3 and 6, evaluated at 2, 4 and 6. To look at, or to copy: not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    raw = runs.sections(
        corpus, cache, root / "run", evaluate={"every_steps": 2, "max_blocks": 4}, logging={"plots": True}
    )
    from moe_llm.cli import main

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

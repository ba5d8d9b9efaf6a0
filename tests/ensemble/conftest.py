"""Checkpoints that several tests look at."""

import pytest
from ensemble_fakes import TEXT, checkpoint


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """a and c are Llamas, b a Mixtral; all of one vocabulary."""
    root = tmp_path_factory.mktemp("models")
    return {
        "a": checkpoint(root / "a", "llama", 1),
        "b": checkpoint(root / "b", "mixtral", 2),
        "c": checkpoint(root / "c", "llama", 3, num_hidden_layers=1),
    }


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)

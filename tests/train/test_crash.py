"""Two ranks killed at random moments, saves among them: see scripts/crash_test.py, of which this is a short run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.grid
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_that_is_killed_twice_is_the_run_that_was_not(mode):
    """Marked, since each of its four starts of two ranks takes some ten seconds."""
    command = [sys.executable, str(ROOT / "scripts/crash_test.py"), "--kills", "2", "--modes", mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout

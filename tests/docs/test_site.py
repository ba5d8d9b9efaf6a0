"""The site of the documentation builds, without a warning and without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(configuration: Path, site: Path) -> subprocess.CompletedProcess:
    # addresses that nothing answers: a build that asks a network would fail
    away = {"NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", configuration, "-d", site],
        capture_output=True, text=True, env=os.environ | away, cwd=ROOT, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("built") / "site"
    done = build(ROOT / "docs/site/mkdocs.yml", site)
    assert done.returncode == 0, done.stderr
    return site


def test_every_page_is_built(site):
    pages = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    built = [site / (page.parent if page.name == "index" else page) / "index.html" for page in pages]
    assert len(pages) > 40
    assert [path for path in built if not path.is_file()] == []


def test_pages_fetch_nothing_from_elsewhere(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert "<script" in text
    assert "fonts.googleapis" not in text


def test_a_broken_link_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Page\n\n[gone](nowhere.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ndocs_dir: docs\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere.md" in done.stdout + done.stderr

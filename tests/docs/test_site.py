"""The site of the documentation builds without a warning and a network, and its pages fit a screen and a phone."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support.browser import CHROMIUM, browser

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


def test_a_page_has_one_title_and_its_sections_are_below_it(site):
    for page in site.rglob("index.html"):
        levels = [int(level) for level in re.findall(r'<h([1-6]) id="', page.read_text(encoding="utf-8"))]
        assert levels[:1] == [1], page
        assert levels.count(1) == 1, page
        assert all(after - before <= 1 for before, after in pairwise(levels)), page


# Code and tables scroll by themselves; a page that is wider than the window does not.
LOOKED_AT = """({
    wider: document.documentElement.scrollWidth - window.innerWidth,
    missing: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
    background: getComputedStyle(document.body).backgroundColor,
    code: Math.max(0, ...[...document.querySelectorAll("pre > code")].map(code => code.scrollWidth - code.clientWidth)),
})"""
QUICK = ("guides/merging", "guides/routers", "reference/architectures")  # pictures, and the widest tables and code


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("names", [QUICK, pytest.param(None, marks=pytest.mark.grid)], ids=["quick", "all"])
def test_pages_fit_a_screen_and_a_phone_in_light_and_dark(names, site, tmp_path):
    pages = [page for page in site.rglob("index.html") if names is None or str(page.parent.relative_to(site)) in names]
    assert len(pages) >= (len(names) if names else 60)
    with browser(tmp_path) as tab:
        for page in pages:
            for width, scheme in ((1280, "light"), (390, "dark")):
                tab.open(page, width, 900, scheme)
                seen = tab.value(LOOKED_AT)
                assert seen["wider"] <= 0, (page, width)
                assert seen["missing"] == [], page
                assert (seen["background"] == "rgb(255, 255, 255)") == (scheme == "light"), page
                assert width < 1280 or seen["code"] <= 1, f"{page}: code is cut off"
    assert [error for error in tab.errors if "asks for" not in error] == []


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

"""Take the documentation's screenshots, of two runs' pages as Chromium shows them.

    moe-llm train configs/quickstart.yaml run.dir=runs/quickstart
    moe-llm train configs/quickstart.yaml run.dir=runs/unbalanced model.router_aux_loss_coef=0
    python scripts/screenshots.py runs/quickstart runs/unbalanced

Writes docs/images/report.png, report_compared.png (dark), load.png, inspect.png and expert_matching.png.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
sys.path.insert(0, str(ROOT / "tests"))
# two kinds of text for the page of an inspection
TEXTS = {"code": Path(argparse.__file__), "prose": ROOT / "README.md"}


def moe_llm(room: Path, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "moe_llm", *map(str, arguments)], check=True, cwd=room)


def pages(run: Path, other: Path, room: Path) -> dict[str, Path]:
    """The pages that are looked at, made anew."""
    moe_llm(room, "report", run, "--out", "report.html")
    moe_llm(room, "report", run, other, "--out", "compared.html")
    texts = [shutil.copyfile(path, room / f"{name}.txt").name for name, path in TEXTS.items()]
    newest = [directory / "checkpoints/latest" for directory in (run, other)]
    moe_llm(room, "inspect", newest[0], "--data", *texts, "--max-tokens", "4096", "--out", "inspect")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(path.resolve()), "parameters": {"weight": 0.5}} for path in newest],
        "align_experts": "weights",
    }
    (room / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    moe_llm(room, "merge", "recipe.yaml", "merged")
    return {
        "report": room / "report.html",
        "compared": room / "compared.html",
        "inspect": room / "inspect/inspect.html",
        "expert_matching": room / "merged/expert_matching.png",
    }


def main() -> None:
    from support.browser import CHROMIUM, browser

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    if CHROMIUM is None:
        parser.error("Chromium is not installed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        found = pages(arguments.run.resolve(), arguments.other.resolve(), room)
        with browser(room / "profile") as page:
            page.open(found["report"], 1100, 1190)
            page.screenshot(arguments.out / "report.png", whole=False)
            page.value(
                "[...document.querySelectorAll('h2')].find(h => h.textContent.includes('load')).scrollIntoView()"
            )
            page.screenshot(arguments.out / "load.png", whole=False)
            page.open(found["compared"], 1100, 970, "dark")
            page.screenshot(arguments.out / "report_compared.png", whole=False)
            page.open(found["inspect"], 1100, 900)
            page.value("document.getElementById('texts').previousElementSibling.scrollIntoView()")
            page.screenshot(arguments.out / "inspect.png", whole=False)
            assert not page.errors, page.errors
        shutil.copyfile(found["expert_matching"], arguments.out / "expert_matching.png")


if __name__ == "__main__":
    main()

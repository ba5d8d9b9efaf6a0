"""What the repository promises beside the package: scripts, images, configurations, README."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from moe_llm.config import Config
from moe_llm.config.base import fields_by_key

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [
    *sorted((ROOT / "scripts").glob("*.sh")),
    ROOT / "scripts/slurm_multi_node.sbatch",
    ROOT / ".ci/run",
]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE = sorted((ROOT / "docker").glob("compose.*.yaml"))
ACCELERATE = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


def constraints() -> dict[str, str]:
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    return [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_range(requirement):
    assert requirement.specifier.contains(constraints()[requirement.name])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_bash_and_stop_at_errors(script):
    subprocess.run(["bash", "-n", script], check=True)
    if script.name == "lib.sh":
        return
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()


def test_ci_runs_the_test_script():
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "bash scripts/test.sh"


def stubbed(directory: Path, *names: str) -> Path:
    """Commands that only say how they were called, in a copy of the repository's shell parts."""
    for name in ("scripts", ".venv/bin", "docker"):
        (directory / name).mkdir(parents=True)
    for name in ("scripts/lib.sh", "scripts/test.sh", "scripts/quickstart.sh", "docker/constraints.txt"):
        (directory / name).write_text((ROOT / name).read_text())
    (directory / "pyproject.toml").write_text("[project]\n")
    for name in names:
        command = directory / ".venv/bin" / name
        body = f'echo "{name} $*" >>calls\n[[ -n ${{FAIL:-}} && "{name} $*" == $FAIL* ]] && exit 3\n'
        # `python -c ... version("torch")` is read by the installer
        body += '[[ $* == *version* ]] && echo "torch==2.13.0+cpu"\nexit 0\n'
        command.write_text(f"#!/usr/bin/env bash\n{body}")
        command.chmod(0o755)
    return directory


def run_script(directory: Path, name: str, *arguments: str, **env: str) -> tuple[int, list[str]]:
    (directory / "calls").unlink(missing_ok=True)
    path = f"{directory / '.venv/bin'}:/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", directory / "scripts" / name, *arguments],
        env={"PATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = directory / "calls"
    assert calls.exists(), done.stderr
    return done.returncode, calls.read_text().splitlines()


def test_the_test_script_installs_once_and_fails_with_any_of_its_steps(tmp_path):
    clone = stubbed(tmp_path, "python", "ruff", "lint-imports", "mypy")
    code, calls = run_script(clone, "test.sh", "-x", "tests/config")
    assert code == 0
    assert "python -m pip install --quiet -c .venv/constraints.txt -e .[dev]" in calls
    checks = ["ruff check .", "ruff format --check --quiet .", "lint-imports ", "mypy "]
    assert calls[-5:] == [*checks, "python -m pytest -n 2 --dist loadfile -x tests/config"]
    pinned = (clone / ".venv/constraints.txt").read_text()
    assert re.findall(r"^torch==.*", pinned, re.M) == ["torch==2.13.0+cpu"]  # what is installed stays

    code, calls = run_script(clone, "test.sh")
    assert (code, [call for call in calls if "install" in call]) == (0, [])
    for step in ("ruff", "lint-imports", "mypy", "python -m pytest"):
        assert run_script(clone, "test.sh", FAIL=step)[0] == 3

    (clone / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    code, calls = run_script(clone, "test.sh", FAIL="python -m pip install")
    assert (code, "ruff check ." in calls) == (3, False)
    code, calls = run_script(clone, "test.sh")
    assert (code, len([call for call in calls if "pip install" in call])) == (0, 1)


def test_the_quickstart_script_trains_with_the_overrides(tmp_path):
    clone = stubbed(tmp_path, "python", "moe-llm")
    code, calls = run_script(clone, "quickstart.sh", "train.max_steps=2")
    assert (code, calls[-1]) == (0, "moe-llm train configs/quickstart.yaml train.max_steps=2")
    assert run_script(clone, "quickstart.sh", FAIL="moe-llm")[0] == 3


@pytest.mark.parametrize(
    ("spec", "expected"),
    [(None, "torch==2.13.0"), ("torch==2.12.0 --index-url x", "torch==2.12.0 --index-url x")],
)
def test_torch_is_installed_first_and_pinned(tmp_path, spec, expected):
    clone = stubbed(tmp_path, "python", "moe-llm")
    missing = {"FAIL": "python -c import torch"}
    _, calls = run_script(clone, "quickstart.sh", **missing, **({"TORCH_SPEC": spec} if spec else {}))
    installs = [call for call in calls if "pip install" in call]
    assert installs[0] == f"python -m pip install --quiet {expected}"
    assert installs[1] == "python -m pip install --quiet -c .venv/constraints.txt -e ."


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_launcher_files_start_plain_ranks(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    # MULTI_CPU would start one process without a word, DEEPSPEED would refuse the configuration we build
    assert config.distributed_type == "MULTI_GPU"
    assert config.deepspeed_config == {}
    assert config.mixed_precision == "no"
    assert config.use_cpu == path.stem.startswith("cpu")
    machines, ranks = {"multi_node": (2, 16)}.get(
        path.stem, (1, int(path.stem[-1:]) if path.stem[-1:].isdigit() else 0)
    )
    assert (config.num_machines, config.num_processes) == (machines, ranks)


def test_two_ranks_start_on_a_cpu(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os\nprint(f\"RANK {os.environ['RANK']} OF {os.environ['WORLD_SIZE']}\\n\", end='', flush=True)\n"
    )
    config = ROOT / "configs/accelerate/cpu_2.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["RANK 0 OF 2", "RANK 1 OF 2"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_images_copy_what_exists_and_what_is_let_through(path):
    text = path.read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert source in allowed
    assert f'TORCH_SPEC="torch=={constraints()["torch"]}"' in text
    users = re.findall(r"^USER (.+)$", text, re.M)
    assert users == ["10001"]


@pytest.mark.parametrize("path", COMPOSE, ids=lambda p: p.name)
def test_compose_files_name_what_exists(path):
    for service in yaml.safe_load(path.read_text())["services"].values():
        build = service["build"]
        assert (path.parent / build["context"] / build["dockerfile"]).is_file()
        command = " ".join([*service.get("entrypoint", []), *service["command"]])
        named = re.findall(r"\b(?:configs|scripts)/[\w./]+", command)
        assert named
        assert [name for name in named if not (ROOT / name).is_file()] == []


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(section, path: str = ""):
    for name, field in fields_by_key(section).items():
        key = f"{path}{name}"
        if hasattr(field.annotation, "model_fields"):
            yield from keys(field.annotation, f"{key}.")
        else:
            yield key


def test_the_reference_has_the_whole_configuration_as_it_is():
    table, reference = load(ROOT / "scripts/configuration_table.py"), (ROOT / "docs/configuration.md").read_text()
    assert table.updated(reference) == reference, "run: python scripts/configuration_table.py"
    assert [key for key in keys(Config) if f"| `{key}` |" not in reference] == []


def test_the_readmes_data_is_a_configuration():
    _, _, rest = README.partition("## Your own data")
    example = yaml.safe_load(rest.partition("```yaml")[2].partition("```")[0])
    quickstart = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    Config(**{**quickstart, **example})


def test_readme_and_pages_name_files_that_exist():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?<![\w/])(?:configs|docs|scripts|docker)/[\w./-]+\w", text))
    assert len(named) > 8
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_the_readme_fits_a_few_screens():
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12 * 1024


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def test_every_page_is_in_the_index_and_in_the_site():
    docs = ROOT / "docs"
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - {"index.md"}
    index, site = (docs / "index.md").read_text(), (docs / "site/mkdocs.yml").read_text()
    assert sorted(page for page in pages if f"({page})" not in index or f"- {page}\n" not in site) == []


def test_the_code_page_shows_every_part_of_the_package():
    tree = (ROOT / "docs/developer/architecture.md").read_text(encoding="utf-8")
    parts = [path.parent.name for path in (ROOT / "moe_llm").glob("*/__init__.py")]
    assert len(parts) > 5
    assert [part for part in parts if f"  {part}/ " not in tree] == []


def test_files_stay_short_enough_to_read():
    files = [path for folder in ("moe_llm", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    counts = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in counts.items() if count > 600} == {}


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_the_license_is_the_one_declared():
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_version_is_that_of_the_package():
    assert version("moe_llm") == PYPROJECT["project"]["version"]


def test_a_clone_in_the_working_directory_does_not_hide_the_package(tmp_path):
    """`git clone` gives the clone the package's name, and a directory of that name is importable."""
    (tmp_path / "moe_llm").mkdir()
    code = "import moe_llm; print(moe_llm.UserError.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "UserError"

"""The cluster examples parse, start every machine's launcher with the run's own settings, and name files that are there."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from moe_llm.config import load_config

ROOT = Path(__file__).parents[2]
SKYPILOT = yaml.safe_load((ROOT / "docs/examples/skypilot.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((ROOT / "docs/examples/kubernetes.yaml").read_text()))
JOB = next(part for part in KUBERNETES if part["kind"] == "Job")
CONTAINER = JOB["spec"]["template"]["spec"]["containers"][0]


def launched(script: str, tmp_path: Path, **environment: str) -> list[list[str]]:
    """The words with which a script calls `accelerate`, by a stand-in that only writes them down."""
    stand_in = tmp_path / "accelerate"
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%q " "$@" >> "$CALLS"\necho >> "$CALLS"\n')
    stand_in.chmod(0o755)
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), **environment}
    subprocess.run(["bash", "-c", script], check=True, env=own, cwd=ROOT)
    return [shlex.split(line) for line in calls.read_text().splitlines()]


def check_launch(words: list[str], machines: int, rank: int, first: str) -> None:
    options = dict(zip(words[1::2], words[2::2]))
    assert words[0] == "launch"
    assert (ROOT / options["--config_file"]).is_file()
    assert options["--num_machines"] == str(machines)
    assert options["--num_processes"] == str(8 * machines)
    assert (options["--machine_rank"], options["--main_process_ip"]) == (str(rank), first)
    script, config, *overrides = words[words.index("scripts/train.py") :]
    assert (ROOT / script).is_file()
    assert load_config(ROOT / config).run.dir != load_config(ROOT / config, overrides).run.dir


@pytest.mark.parametrize("rank", [0, 1])
def test_skypilot_starts_each_machine_with_its_number(tmp_path, rank):
    environment = {
        "SKYPILOT_NUM_NODES": str(SKYPILOT["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": SKYPILOT["resources"]["accelerators"].partition(":")[2],
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        **SKYPILOT["envs"],
    }
    [words] = launched(SKYPILOT["run"], tmp_path, **environment)
    check_launch(words, 2, rank, "10.0.0.1")
    assert SKYPILOT["envs"]["RUN_DIR"].startswith(next(iter(SKYPILOT["file_mounts"])))


@pytest.mark.parametrize("rank", [0, 1])
def test_kubernetes_starts_each_pod_with_its_number(tmp_path, rank):
    service = next(part for part in KUBERNETES if part["kind"] == "Service")
    environment = {"JOB_COMPLETION_INDEX": str(rank)} | {e["name"]: e["value"] for e in CONTAINER["env"]}
    assert CONTAINER["command"] == ["bash", "-c"]
    [words] = launched(CONTAINER["args"][0], tmp_path, **environment)
    name = JOB["metadata"]["name"]
    check_launch(words, JOB["spec"]["completions"], rank, f"{name}-0.{service['metadata']['name']}")
    assert JOB["spec"]["parallelism"] == JOB["spec"]["completions"], "all machines start together"
    assert JOB["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 8
    grace = JOB["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
    mounts = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounts == {volume["name"] for volume in JOB["spec"]["template"]["spec"]["volumes"]}


@pytest.mark.neighbours
def test_kubernetes_knows_every_field():
    validate = pytest.importorskip("kubernetes_validate")
    for part in KUBERNETES:
        validate.validate(part, validate.latest_version(), strict=True)

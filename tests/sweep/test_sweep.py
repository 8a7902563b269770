"""A sweep from its files to its table: names that are never shared, states that follow from the folders, and a real one
that is cut, fails and is started again."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from cera_train.cli.composition import config_dir, options, to_config
from cera_train.cli.plan import main as main_plan
from cera_train.cli.start import _with_folder_quoted as with_folder_quoted
from cera_train.cli.sweep import main as main_sweep
from cera_train.cli.train import main
from cera_train.common.settings import leaves
from cera_train.config import Config, PlanRun
from cera_train.planning.plan import RunPlan, make_plan
from cera_train.sweep.folder import BEGUN, JOBS, LONGEST_NAME, RECORD, choices_of, grid, job_name
from cera_train.sweep.table import State, best_jobs, read_sweep

SWEEPS = sorted(config_dir("conf").glob("sweep/*.yaml"))

# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs_of(compose):
    """jobs_of("+sweep=rank_lr", ...) -> the overrides of every job, as Hydra's sweeper makes them."""

    def jobs_of(*arguments: str) -> list[list[str]]:
        with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
            loaded = GlobalHydra.instance().hydra
            return grid(loaded.compose_config("plan", list(arguments), run_mode=RunMode.MULTIRUN))

    return jobs_of


@pytest.fixture(scope="module")
def plans_of(jobs_of):
    """plans_of("+sweep=rank_lr", ...) -> the plan of every job."""
    known: dict[tuple[str, ...], RunPlan] = {}

    def plan(job: list[str]) -> RunPlan:
        key = tuple(sorted(override for override in job if not override.startswith("name=")))
        if key not in known:
            with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
                known[key] = make_plan(to_config(hydra.compose("plan", job), PlanRun))
        return known[key]

    return lambda *arguments: [plan(job) for job in jobs_of(*arguments)]


def test_the_glob_found_the_sweeps():
    assert {path.stem for path in SWEEPS} == {
        *("rank_lr", "model_scale", "data_sets", "rank_scaling"),
        *("ablation_gate", "ablation_targets", "ablation_dropout", "quickstart_grid"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_job_of_every_sweep_composes_and_has_a_folder_of_its_own(compose, jobs_of, plans_of, path):
    jobs = jobs_of(f"+sweep={path.stem}")
    plans = plans_of(f"+sweep={path.stem}")
    for plan in plans:
        assert plan.config.name == path.stem
        assert plan.config.adapter.alpha is None  # each method at the scale CeRA has
    swept = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    names = {job_name(job, swept) for job in jobs}
    assert len(names) == len(jobs) > 1
    for job in (jobs[0], jobs[-1]):
        assert isinstance(compose(*job), Config)


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweeps_header_says_its_command_and_what_cera_plan_predicts(plans_of, path):
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert header.startswith("# @package _global_\n")
    assert f"command   cera-train -m +sweep={path.stem}\n" in header
    assert "expected  " in header
    plans = plans_of(f"+sweep={path.stem}")
    if path.stem == "quickstart_grid":  # it was measured
        assert f"cost      {len(plans)} jobs, " in header
    else:
        hours = f"{sum(plan.gpu_hours for plan in plans):,.2f}"
        assert f"cost      {len(plans)} jobs, {hours} GPU-hours of an H100 by cera-plan" in header
        assert all(plan.data.source == "an estimate" for plan in plans)
        assert "tokens per row are estimates" in header
        assert all(plan.fits for plan in plans)


@pytest.mark.slow
def test_the_costs_of_recipes_are_what_cera_plan_predicts(plans_of):
    for name in set(options("recipe")) - {"quickstart"}:  # it was measured
        gpu, called = ("rtx4090", "RTX 4090") if name == "math_r64_nf4" else ("h100", "H100")
        (plan,) = plans_of(f"+recipe={name}", f"plan.gpu={gpu}")
        header = (config_dir("recipes") / f"{name}.yaml").read_text()
        assert f"{plan.gpu_hours:.1f} hours of one {called} by cera-plan" in header
        assert f"{plan.totals.updates:,} updates of 64" in header


@pytest.mark.slow
def test_the_table_of_the_papers_results_says_what_cera_plan_predicts(plans_of):
    """recipes/README.md: every command that trains composes, and its jobs and GPU-hours are those of now."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (config_dir("recipes") / "README.md").read_text().splitlines()
        if line.startswith("|") and "`cera-train " in line
    ]
    assert len(rows) >= 10
    seen = set()
    for row in rows:
        command, jobs, hours = row[1:4]
        (command,) = re.fullmatch(r"`cera-train (.*)`", command).groups()
        arguments = [argument for argument in shlex.split(command) if argument != "-m"]
        plans = plans_of(*arguments)
        assert ("-m " in command) == (len(plans) > 1), command
        assert (jobs, hours) == (str(len(plans)), f"{sum(plan.gpu_hours for plan in plans):,.2f}"), command
        assert all(plan.fits for plan in plans), command
        seen |= set(re.findall(r"\b(?:\w+_)*\w+\b", command))
    assert {path.stem for path in SWEEPS} - {"quickstart_grid"} <= seen
    assert set(options("recipe")) - {"quickstart", "math_r64_nf4"} <= seen


def test_an_argument_replaces_a_dimension_of_the_file(jobs_of):
    jobs = jobs_of("+sweep=rank_lr", "model=llama3_2_1b", "optimizer.lr=3e-4")
    assert len(jobs) == 9
    assert all({"model=llama3_2_1b", "optimizer.lr=0.0003"} <= set(job) for job in jobs)
    wider = jobs_of("+sweep=rank_lr", "adapter=cera", "adapter.r=64", "train.seed=range(3)")
    assert len(wider) == 4 * 3


def test_cera_plan_adds_up_a_sweeps_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cera_train.cli.plan.JOBS", [])
    monkeypatch.setattr(sys, "argv", ["cera-plan", "-m", "+sweep=rank_scaling", "adapter=cera"])
    main_plan()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("adapter.r=16 ")
    assert lines[-1].startswith("4 jobs ")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["cera-plan", "+sweep=rank_scaling"])
    with pytest.raises(SystemExit) as exit_info:
        main_plan()
    assert exit_info.value.code == 2
    assert "+sweep=rank_scaling is a grid of runs: add -m" in capsys.readouterr().err


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_job_is_named_by_its_choices_in_any_order():
    job = ["optimizer.lr=0.0003", "+sweep=rank_lr", "adapter=cera", "adapter.r=64", "name=rank_lr", "tracker=wandb"]
    assert job_name(job) == "adapter=cera,adapter.r=64,optimizer.lr=0.0003"
    assert job_name(reversed(job)) == job_name(job)
    assert job_name(["++adapter.r=64"]) == job_name(["adapter.r=64"]) == "adapter.r=64"
    assert job_name(["+recipe=quickstart", "name=a"]) == "default"


@pytest.mark.parametrize("key", [leaf.key for leaf in leaves(Config) if leaf.changes in ("cost", "nothing")])
def test_a_setting_that_changes_no_result_names_a_job_only_where_it_is_swept(key):
    job = ["adapter.r=64", f"{key}=1"]
    assert job_name(job) == "adapter.r=64"
    assert job_name(job, swept=[key]) == ",".join(sorted(job))


def test_a_swept_recipe_names_its_job():
    assert job_name(["+recipe=math_r64", "name=main"], swept=["recipe"]) == "recipe=math_r64"


ODD = [
    ["adapter.target_modules=[q_proj,v_proj]"],
    ["adapter.target_modules=[q_proj,v_proj,o_proj]"],
    ["adapter.target_modules='q_proj,v_proj'"],
    ["adapter.target_modules='.*(q|v)_proj'"],
    ["adapter.target_modules=q_proj-v_proj"],
    ["data.prompt='Q: {question}'"],
    ["data.prompt='Q? {question}'"],
    ["data.prompt=../../etc/passwd"],
    ["data.train_files=[/data/train.jsonl]", "data.eval_rows=5"],
    ["data.train_files=[/data/train.jsonl,/data/more.jsonl]"],
    ["data.prompt=Größe"],
    ["adapter.alpha=$\\{adapter.r\\}"],
    ["~train.seed"],
    [f"data.prompt={'x' * 300}1"],
    [f"data.prompt={'x' * 300}2"],
    [f"data.prompt={'ä' * 300}"],
    [f"train.seed={seed}" for seed in range(40)],
    ["optimizer.lr=1e-05"],
    ["optimizer.lr=-1e-05"],
    ["adapter.r=64"],
    ["adapter.r=64,"],
]


def test_no_two_jobs_share_a_folder_and_every_name_is_one_plain_name(tmp_path):
    names = [job_name(job) for job in ODD]
    for one, other in combinations(names, 2):
        assert one != other
    for name in names:
        assert re.fullmatch(r"[\w.=,+-]+", name, re.ASCII), name
        assert len(name) <= LONGEST_NAME
        assert not name.startswith((".", "-"))
        (tmp_path / name).mkdir()
    assert job_name(ODD[0]).startswith("adapter.target_modules=q_proj-v_proj-")
    assert job_name(ODD[0]) == job_name(ODD[0])


def test_a_secret_names_no_folder(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hf_abcdefghijkl")
    name = job_name(["model.path=https://user:hf_abcdefghijkl@host/model"])
    assert "hf_abc" not in name
    assert "user" not in name
    assert name != job_name(["model.path=https://user:other@host/model"])


def test_interpolations_read_as_they_were_typed():
    assert choices_of(["adapter.alpha=$\\{adapter.r\\}"]) == ["adapter.alpha=${adapter.r}"]


def test_a_folder_with_commas_is_one_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "outputs/rank_lr/adapter=cera,adapter.r=64"
    Path(folder).mkdir(parents=True)
    assert with_folder_quoted(f"run={folder}") == f"run='{folder}'"
    for argument in (f"run={folder}0", "adapter=cera,lora", "run=outputs/rank_lr", "-m", f"run='{folder}'"):
        assert with_folder_quoted(argument) == argument


# --- states ----------------------------------------------------------------------------------------------------------


def make_job(sweep: Path, name: str, perplexity: float | None = None, error: str | None = None, **data: str) -> Path:
    """A job's folder as a run leaves it: of 20 updates; unfinished without a perplexity."""
    folder = sweep / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"max_updates": 20}, "data": data}))
    lines = [{"update": 0, "eval/perplexity": 9.0}, {"update": 5, "train/loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"update": 6, "tr')
    if perplexity is not None:
        (folder / "result.json").write_text(json.dumps({"updates": 20, "eval/perplexity": perplexity}))
    if error is not None:
        record_job(sweep, name, error)
    return folder


def record_job(sweep: Path, name: str, error: str | None, number: int = 1) -> Path:
    path = sweep / JOBS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"number": number, "overrides": name.split(","), "error": error}))
    return path


def record_sweep(sweep: Path, *names: str) -> None:
    sweep.mkdir(parents=True, exist_ok=True)
    jobs = [{"name": name, "overrides": name.split(",")} for name in names]
    (sweep / RECORD).write_text(json.dumps({"command": ["cera-train"], "swept": [], "jobs": jobs}))


def states(sweep: Path) -> dict[str, State]:
    return {job.name: job.state for job in read_sweep(sweep)}


def test_a_state_follows_from_what_lies_in_the_folder(tmp_path):
    names = ["adapter.r=2", "adapter.r=4", "adapter.r=8", "adapter.r=16", "adapter.r=32"]
    record_sweep(tmp_path, *names)
    make_job(tmp_path, "adapter.r=2", 2.5)
    make_job(tmp_path, "adapter.r=4")
    make_job(tmp_path, "adapter.r=8", error="the loss is not finite")
    record_job(tmp_path, "adapter.r=16", "impossible")
    jobs = {job.name: job for job in read_sweep(tmp_path)}
    assert list(jobs) == names  # in the order of the grid
    assert [job.state for job in jobs.values()] == ["finished", "cut", "failed", "failed", "waiting"]
    assert [(job.done, job.total) for job in jobs.values()] == [(20, 20), (5, 20), (5, 20), (None, None), (None, None)]
    assert [job.perplexity for job in jobs.values()] == [2.5, 9.0, 9.0, None, None]
    assert jobs["adapter.r=8"].error == "the loss is not finite"


def test_a_job_is_running_while_its_lock_is_held_and_cut_after_its_process_was_killed(tmp_path):
    record_sweep(tmp_path, "adapter.r=2")
    folder = make_job(tmp_path, "adapter.r=2", error="of the last time")
    hold = (
        "import sys, time; from pathlib import Path; from cera_train.common.files import lock_folder\n"
        "lock = lock_folder(Path(sys.argv[1]), 'run'); print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    for _ in range(3):
        assert states(tmp_path) == {"adapter.r=2": "running"}
    with pytest.raises(Exception, match="could not be acquired"):
        FileLock(folder / ".lock").acquire(timeout=0)  # the holder still has it
    record_job(tmp_path, "adapter.r=2", None)
    holder.kill()
    holder.communicate()
    assert (folder / ".lock").exists()
    assert states(tmp_path) == {"adapter.r=2": "cut"}
    with FileLock(folder / ".lock").acquire(timeout=0):  # looking took nothing
        assert states(tmp_path) == {"adapter.r=2": "running"}


def test_the_newer_of_an_error_and_a_result_counts(tmp_path):
    record_sweep(tmp_path, "adapter.r=2")
    folder = make_job(tmp_path, "adapter.r=2", 2.5, error="holds a run with another config")
    result, record = folder / "result.json", tmp_path / JOBS / "adapter.r=2.json"
    os.utime(result, (100, 100))
    assert states(tmp_path) == {"adapter.r=2": "failed"}
    os.utime(record, (50, 50))
    assert states(tmp_path) == {"adapter.r=2": "finished"}


def test_jobs_that_no_file_lists_come_as_they_were_started(tmp_path):
    """So Optuna's do, and those of an earlier grid in the same folder."""
    record_sweep(tmp_path, "adapter.r=2")
    for number, name in enumerate(["optimizer.lr=0.3", "optimizer.lr=0.1", "adapter.r=2"]):
        make_job(tmp_path, name, 2.0)
        record_job(tmp_path, name, None, number)
    assert list(states(tmp_path)) == ["adapter.r=2", "optimizer.lr=0.3", "optimizer.lr=0.1"]


def test_the_best_is_of_finished_jobs_on_the_same_rows(tmp_path):
    names = ["data=a,adapter.r=2", "data=a,adapter.r=4", "data=a,adapter.r=8", "data=b,adapter.r=2"]
    record_sweep(tmp_path, *names)
    make_job(tmp_path, names[0], 2.5, path="a")
    make_job(tmp_path, names[1], 2.4, path="a")
    make_job(tmp_path, names[2], path="a")
    make_job(tmp_path, names[3], 3.5, path="b")
    assert [job.name for job in best_jobs(read_sweep(tmp_path))] == [names[1], names[3]]


def cera_sweep(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cera-sweep", *map(str, arguments)])
    main_sweep()


def test_the_table_is_aligned_and_names_what_differs(tmp_path, monkeypatch, capsys):
    sweep = tmp_path / "ranks"
    names = ["adapter=cera,adapter.r=4,train.seed=1", "adapter=lora,adapter.r=512,train.seed=1"]
    record_sweep(sweep, *names)
    make_job(sweep, names[0], 1234.5678)
    make_job(sweep, names[1], error="x" * 200)
    cera_sweep(monkeypatch, sweep)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"sweep      {sweep}: train.seed=1",
        "",
        "job                         state            updates   perplexity",
        "adapter=cera,adapter.r=4    finished           20/20    1,234.568  best",
        f"adapter=lora,adapter.r=512  failed              5/20        9.000  {'x' * 71}…",
        "",
        "jobs       1 finished, 1 failed",
        f"best       {sweep / names[0]}: perplexity 1,234.568",
        f"errors     in full in {sweep / JOBS}; the same command tries these jobs again",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing is not a folder: expected one that cera-train -m left"),
        (["."], r"\. holds no sweep: expected one that cera-train -m left \(with sweep.json\)"),
        ([], "the following arguments are required: DIR .see cera-sweep --help"),
        (["broken"], "sweep.json is broken: .* Remove it, and start the sweep again"),
    ],
)
def test_a_folder_that_is_no_sweep_gets_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RECORD).write_text('{"jobs": [')
    with pytest.raises(SystemExit) as exit_info:
        cera_sweep(monkeypatch, *arguments)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"cera-sweep: .*{message}", line), line


# --- a real one ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep_here(tmp_path, tiny_folder):
    """A working folder with a sweep file of the user's own: two by two jobs, of which one is impossible."""
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    content = {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"max_length": 256},
        "train": {"max_updates": 6, "batch_size": 16, "eval_every": None, "save_every": None},
        "hydra": {"sweeper": {"params": {"adapter": "lora,cera", "adapter.activation": "relu,silu"}}},
    }
    (tmp_path / "conf" / "sweep" / "tiny.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content))
    return tmp_path


TINY = ["--config-dir", "conf", "-m", "+sweep=tiny"]


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cera_train", *arguments],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def content_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_same_command_skips_the_finished_goes_on_with_the_cut_and_runs_the_missing(sweep_here, monkeypatch, capsys):
    sweep = sweep_here / "outputs" / "tiny"
    command = [*TINY, "train.max_updates=100"]
    failing, finished, cut, missing = (
        f"adapter={kind},adapter.activation={gate},train.max_updates=100"
        for kind in ("lora", "cera")
        for gate in ("relu", "silu")
    )
    process = start(*command, cwd=sweep_here)
    deadline = time.monotonic() + 120
    while not (sweep / cut / "metrics.jsonl").exists() or len((sweep / cut / "metrics.jsonl").read_text()) < 2000:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list(states(sweep).values()) == ["failed", "finished", "running", "waiting"]
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "The same command goes on" in output
    assert list(states(sweep)) == [failing, finished, cut, missing]
    assert list(states(sweep).values()) == ["failed", "finished", "cut", "waiting"]
    (checkpoint,) = (sweep / cut / "checkpoints").iterdir()
    assert 0 < int(checkpoint.name) < 100

    before = content_of(sweep / finished)
    process = start(*command, cwd=sweep_here)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert content_of(sweep / finished) == before
    assert f"finished   outputs/tiny/{finished}: perplexity" in output
    assert f"run        outputs/tiny/{cut}, 100 updates of 16 sequences, {int(checkpoint.name)} done" in output
    assert f"run        outputs/tiny/{missing}, 100 updates of 16 sequences\n" in output
    assert list(states(sweep).values()) == ["failed", "finished", "finished", "finished"]
    # Each error once, the table once, and nothing of Hydra's beside the jobs.
    assert errors.count("\n") == errors.count("adapter.activation=relu is the gate of cera") == 1
    assert output.count("\njobs       3 finished, 1 failed\n") == output.count("\nbest       outputs") == 1
    assert {path.name for path in sweep.iterdir()} == {JOBS, RECORD, finished, cut, missing}
    monkeypatch.chdir(sweep_here)
    cera_sweep(monkeypatch, "outputs/tiny")
    assert output.endswith("\n" + capsys.readouterr().out)  # cera-sweep shows the same table

    # A report reads the sweep's folder as it is.
    from cera_train.report.page import write_report

    assert [run.name for run in write_report([sweep], sweep_here / "report").runs] == [cut, missing, finished]


@pytest.mark.slow
def test_a_job_that_is_killed_in_a_process_of_its_own_stops_no_other(sweep_here):
    pytest.importorskip("submitit")
    sweep = sweep_here / "outputs" / "tiny"
    settings = ["adapter.activation=silu", "train.max_updates=300"]
    process = start(*TINY, *settings, "hydra/launcher=local", cwd=sweep_here)
    cut, finished = (
        sweep / f"adapter={kind},adapter.activation=silu,train.max_updates=300" for kind in ("cera", "lora")
    )
    deadline = time.monotonic() + 120
    while not (cut / "metrics.jsonl").exists() or states(sweep)[cut.name] != State.running:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    holder = subprocess.run(["fuser", cut / ".lock"], capture_output=True, text=True, check=True).stdout
    os.kill(int(holder), signal.SIGKILL)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert "lost       job " in output
    assert states(sweep) == {finished.name: State.finished, cut.name: State.cut}
    assert "jobs       1 finished, 1 cut" in output


def cera_train(monkeypatch, cwd: Path, *arguments: str) -> int:
    """In this process, where torch is imported already."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["cera-train", *arguments])
    BEGUN.clear()
    try:
        main()
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.slow
def test_a_job_that_diverges_stops_no_other_nor_the_next_batch(sweep_here, monkeypatch, capfd):
    arguments = ["adapter=cera", "adapter.activation=silu", "optimizer.lr=1e30,1e-3", "optimizer.weight_decay=0"]
    assert cera_train(monkeypatch, sweep_here, *TINY, *arguments, "hydra.sweeper.max_batch_size=1") == 1
    output, errors = capfd.readouterr()
    assert list(states(sweep_here / "outputs" / "tiny").values()) == ["failed", "finished"]
    assert len(errors.splitlines()) == 1
    assert "or its gradient is not finite" in errors
    assert "job        2 of 2: " in output
    # What an earlier command left is shown, and is no failure of a later one.
    assert cera_train(monkeypatch, sweep_here, *TINY, *arguments, "optimizer.lr=1e-3") == 0
    assert list(states(sweep_here / "outputs" / "tiny").values()) == ["finished", "failed"]


def test_a_bug_in_a_job_keeps_its_traceback_and_stops_no_other(sweep_here, monkeypatch, capfd):
    def train(config: Config) -> dict:
        if config.adapter.activation == "relu":
            raise RuntimeError("of ours")
        return {"eval/perplexity": 1.5}

    monkeypatch.setattr("cera_train.training.launch.launch", train)
    assert cera_train(monkeypatch, sweep_here, *TINY, "adapter=cera") == 1
    output, errors = capfd.readouterr()
    assert errors.count("Traceback") == 1
    assert "a bug: RuntimeError: of ours" in output
    assert "job        2 of 2: " in output


def test_a_job_gets_the_sweeps_folder_whatever_its_recipe_is_named(sweep_here, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "cera_train.training.launch.launch", lambda config: seen.append(config) or {"eval/perplexity": 1.5}
    )
    arguments = ["-m", "+recipe=math_r64,math_dora_r64", "name=main", "train.micro_batch_tokens=2048"]
    assert cera_train(monkeypatch, sweep_here, *arguments) == 1  # nothing is finished
    assert [(config.output_dir, config.name) for config in seen] == [
        ("outputs/main", "recipe=math_r64"),
        ("outputs/main", "recipe=math_dora_r64"),
    ]
    assert [bool(config.published) for config in seen] == [True, True]  # they are as published
    assert not (sweep_here / "outputs" / "math_r64").exists()


def test_the_peak_memory_of_a_process_is_not_that_of_its_parent():
    held = torch.ones(400_000_000)  # 1.6 GB
    script = "import torch\nfrom cera_train.distributed.accelerator import peak_memory\n"
    script += "print(peak_memory(torch.device('cpu')))"
    assert int(subprocess.check_output([sys.executable, "-c", script])) < held.nbytes


def test_the_peak_memory_of_a_job_is_its_own():
    """The jobs of a sweep share a process, whose peak would be the largest job's."""
    from cera_train.distributed.accelerator import forget_earlier_runs, peak_memory

    large = bytearray(300_000_000)
    before = peak_memory(torch.device("cpu"))
    del large
    forget_earlier_runs()
    assert peak_memory(torch.device("cpu")) < before - 250_000_000


def test_an_impossible_type_is_said_before_anything_runs(sweep_here, monkeypatch, capfd):
    assert cera_train(monkeypatch, sweep_here, *TINY, "adapter.r=4,abc") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "adapter.r: Value 'abc'" in line
    assert set(states(sweep_here / "outputs" / "tiny").values()) == {"waiting"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+sweep=rank_lr"], r"\+sweep=rank_lr is a grid of runs: add -m"),
        (["-m", "+sweep=rank_l"], "unknown sweep 'rank_l'. Did you mean rank_lr"),
        (["-m", "sweep=rank_lr"], r"a sweep is added with a plus sign: write \+sweep=rank_lr"),
        (["-m", "adapter.r=2,4", "name=r${adapter.r}"], "name=... is the folder of all jobs"),
        (["-m", "name=a,b"], "name=a,b is another for each job"),
        (["-m", "output_dir=a,b"], "output_dir=a,b is another for each job"),
        (["-m", "adapter.r=2,4", "name=run"], "outputs/run is the folder of a run: choose another name"),
        (["name=swept"], "outputs/swept is the folder of a sweep: choose another name=... for a run, or add -m"),
    ],
)
def test_a_sweep_and_a_run_share_no_folder(tmp_path, monkeypatch, capfd, arguments, message):
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "config.yaml").write_text("adapter: {}\n")
    record_sweep(tmp_path / "outputs" / "swept")
    assert cera_train(monkeypatch, tmp_path, *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"run", "swept"}


@pytest.mark.slow
def test_optuna_minimises_the_perplexity_and_counts_a_failure(sweep_here):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")
    sampler = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    command = [
        *("--config-dir", "conf", "-m", "+sweep=tiny", *sampler, "hydra.sweeper.sampler.seed=1"),
        *("adapter=cera", "adapter.activation=silu", "optimizer.lr=tag(log,interval(1e-3,1e-1))"),
    ]
    process = start(*command, cwd=sweep_here)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    sweep = sweep_here / "outputs" / "tiny"
    jobs = read_sweep(sweep)
    assert [job.state for job in jobs] == ["finished"] * 3
    (best,) = best_jobs(jobs)
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert found["best_value"] == best.perplexity == min(job.perplexity for job in jobs)
    assert f"optimizer.lr={found['best_params']['optimizer.lr']}" in best.choices
    assert f"best       outputs/tiny/{best.name}: perplexity" in output

    # One of two trials is impossible: the study goes on.
    sampler = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]
    command = [
        *command[:4],
        *sampler,
        "adapter=cera",
        "adapter.activation=silu",
        "adapter.dropout=1.5,0.0",
        "name=failing",
    ]
    process = start(*command, cwd=sweep_here)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert sorted(states(sweep_here / "outputs" / "failing").values()) == [State.failed, State.finished]
    assert "Error executing job" not in errors

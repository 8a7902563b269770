"""The life of one row of choices: planned, trained, killed and resumed, evaluated, asked, exported,
reported. A command is a fork of one process that has imported everything: a second each, not six.
"""

import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from choices import FACTORS
from tiny_runs import metrics_of

from cera_train.cli.start import main
from cera_train.runs.folder import RunFolder
from cera_train.runs.results import METRICS

FORKS = multiprocessing.get_context("forkserver")

SECONDS = 200
"""A command that takes longer hangs."""

SHORT = (
    "data.max_length=96 data.eval_rows=6 train.batch_size=8 train.max_updates=6 "
    "train.eval_every=3 train.save_every=2 train.micro_batch_tokens=1024 optimizer.lr=1e-2 "
    "adapter.r=4"
)
"""Five updates are an epoch."""

OTHERWISE = "train.micro_batch_tokens=96 train.compile=false model.gradient_checkpointing=true"
"""Settings that change no loss."""


# --- a command ------------------------------------------------------------------------------------


@dataclass
class Ended:
    """A command that has ended."""

    words: list[str]
    status: int
    """Of its exit; negative: the signal that killed it. None: it hangs."""
    printed: str
    error: str

    @property
    def refusal(self) -> str | None:
        """The only line of a mistake, without the name of the command."""
        name = self.words[0]
        lines = [line for line in self.error.splitlines() if line.startswith(f"{name}: ")]
        is_one_line = self.status in (2, 3) and len(lines) == 1 and "Traceback" not in self.error
        return lines[0].removeprefix(f"{name}: ") if is_one_line else None

    def __str__(self) -> str:
        return f"{shlex.join(self.words)}: status {self.status}, {self.error.strip()[-2000:]}"


def run(words: list[str], place: Path, log: Path, killed: str) -> None:
    """The whole of a forked process."""
    os.chdir(place)
    for stream, name in ((1, "printed"), (2, "error")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if killed:
        kill_at(*killed.split())
    sys.argv = words
    main()


def kill_at(event: str, update: str) -> None:
    """Makes the process die as soon as it has logged that update or evaluation."""
    number = signal.SIGTERM if event == "SIGTERM" else signal.SIGKILL
    key = "eval/loss" if event == "evaluation" else "train/loss"
    append = RunFolder.append

    def append_and_die(self: RunFolder, name: str, line: Any) -> None:
        append(self, name, line)
        if name == METRICS and line["update"] == int(update) and key in line:
            os.kill(os.getpid(), number)

    RunFolder.append = append_and_die


def start_forking() -> None:
    """Starts the process that forks the commands; it finds modules where this one does."""
    FORKS.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


# --- a life ---------------------------------------------------------------------------------------

PARALLEL = ("launch.processes", "distributed.strategy")


@dataclass
class Life:
    """What becomes of a row."""

    row: dict[str, str]
    place: Path
    """Where the bases and the rows are, and every command runs."""
    folder: Path
    fixes: dict[str, str] = field(default_factory=dict)
    """Settings that refusals named."""
    refused: list[tuple[Ended, Ended, bool]] = field(default_factory=list)
    """Plans and runs before their repair, and whether the run had begun to train."""
    ended: dict[str, Ended] = field(default_factory=dict)
    """Commands by their step."""

    def __post_init__(self) -> None:
        self.whole = self.folder / "whole"
        self.other = self.folder / "other"
        self.resumed = self.folder / "moved" / "cut"

    @property
    def settings(self) -> dict[str, str]:
        chosen = [self.row[factor] for factor in FACTORS if factor not in ("killed", "export")]
        words = " ".join([SHORT, *chosen]).replace("{life}", str(self.folder))
        return settings_of(words) | self.fixes

    @property
    def has_start(self) -> bool:
        return self.settings.get("adapter.start_from", "null") != "null"

    def command(self, step: str, *words: str, killed: str = "") -> Ended:
        log = self.folder / "logs" / step
        log.mkdir(parents=True, exist_ok=True)
        process = FORKS.Process(target=run, args=(list(words), self.place, log, killed))
        process.start()
        process.join(SECONDS)
        status = process.exitcode
        process.kill()
        process.join()
        texts = [(log / name).read_text() for name in ("printed", "error")]
        self.ended[step] = Ended(list(words), status, *texts)
        return self.ended[step]

    def commands(self) -> list[Ended]:
        """All, in their order."""
        return [
            *(ended for plan, run, _ in self.refused for ended in (plan, run)),
            *self.ended.values(),
        ]

    def plan(self, changes: Mapping[str, str | None]) -> Ended:
        here = dict.fromkeys(PARALLEL) | {"plan.gpu": "cpu"}
        if "data.path" in self.settings:  # a plan reads no rows of the Hub
            here["plan.tokens_per_row"] = "30"
        return self.command("plan", "cera-plan", *self.words(here | changes))

    def train(self, step: str, killed: str = "", **changes: str | None) -> Ended:
        changes = {"name": step} | dict.fromkeys(PARALLEL) | changes
        return self.command(step, "cera-train", *self.words(changes), killed=killed)

    def words(self, changes: Mapping[str, str | None]) -> list[str]:
        settings = self.settings | {"output_dir": str(self.folder)} | changes
        return [f"{key}={value}" for key, value in settings.items() if value is not None]

    # --- chapters ---------------------------------------------------------------------------------

    def live(self) -> None:
        """Plans and trains. What is refused is repaired, and the life begins anew."""
        while (refused := self.plan_and_train()) is not None:
            assert refused.refusal is not None, refused
            self.repair(refused.refusal)
            shutil.rmtree(self.folder)
        self.go_on()

    def plan_and_train(self) -> Ended | None:
        """Trains what to start from, and plans and trains the row, which then trains in other
        micro-batches and in its processes. Returns what was refused."""
        self.ended.clear()
        steps = {"whole": {}}
        if self.has_start:
            start = dict.fromkeys(("adapter.start_from", "train.tasks_every"))
            steps = {"start": start | {"train.max_updates": "2"}} | steps
        for step, changes in steps.items():
            plan = self.plan(changes) if step == "whole" else None
            if (ended := self.train(step, **changes)).status:
                has_begun = any("train/loss" in line for line in metrics_of(self.folder / step))
                self.refused.append((plan or self.plan(changes), ended, has_begun))
                return ended
        parallel = {key: self.settings.get(key) for key in PARALLEL}
        other = self.train("other", **settings_of(OTHERWISE) | parallel)
        return other if other.status else None

    def repair(self, refusal: str) -> None:
        """Takes the first fix that a refusal names and that was not tried; else makes the first
        choice of the last factor that it names."""
        for key, value in fixes_in(refusal):
            if key not in self.fixes and self.settings.get(key) != value:
                self.fixes[key] = value
                return
        named = [
            factor
            for factor, choices in FACTORS.items()
            if self.row[factor] != next(iter(choices)) and is_named(self.row[factor], refusal)
        ]
        assert named, f"it names no fix: {refusal}"
        self.row = self.row | {named[-1]: next(iter(FACTORS[named[-1]]))}
        self.fixes = {}

    def go_on(self) -> None:
        """Kills the run, moves and resumes it; then does with the whole run what its user does."""
        self.train("cut", self.row["killed"])
        self.resumed.parent.mkdir()
        (self.folder / "cut").rename(self.resumed)
        self.train("resumed", output_dir=str(self.resumed.parent), name="cut")
        run = f"run={self.whole}"
        task = "task=perplexity"
        if not self.has_start:
            base = ["run=base", f"like={self.whole}", f"output_dir={self.folder}"]
            self.command("before", "cera-eval", *base, task)
        self.command("after", "cera-eval", f"run={self.resumed}", task)
        self.command("asked", "cera-chat", run, "prompt=Hello", "max_new_tokens=4")
        exported = self.command("exported", "cera-export", run, *self.row["export"].split())
        fixes = fixes_in(exported.refusal or "")
        if (
            exported.status == 2 and fixes and not fixes[0][0].startswith("adapter.")
        ):  # else: train anew
            self.ended["not exported"] = exported
            self.command("exported", "cera-export", run, "=".join(fixes[0]))
        page = str(self.folder / "page")
        self.command("reported", "cera-report", str(self.whole), str(self.other), "--output", page)


def settings_of(words: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words.split())


def fixes_in(refusal: str) -> list[tuple[str, str]]:
    """The settings of the last sentence, after its last colon."""
    fix = re.split(r"[.:] ", refusal)[-1]
    pairs = re.findall(r"([\w.]+)=([\w/][^\s,;]*)", fix)
    return [(key, value.rstrip(".)")) for key, value in pairs]


def is_named(words: str, refusal: str) -> bool:
    """Whether a refusal names a key or a value of a choice."""
    names = [
        re.escape(name) for name in re.split(r"[\s=]", words) if len(name) > 3 and name != "true"
    ]
    return any(re.search(rf"\b{name}\b", refusal, re.IGNORECASE) for name in names)

"""What a release leaves, for later versions to read: `python -m benchmarks.corpus`.

Runs with a checkpoint halfway, an evaluation, an export, a sweep and a study of a tiny model, made
by the commands, go to tests/compatibility/VERSION.tar.gz with the model and the rows. A release
makes its own once and never again: tests/compatibility/test_releases.py reads every version's."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.rows import random_rows, write_rows
from benchmarks.tiny_models import SIZES, save_random
from cera_train import __version__

ARCHIVE = Path(f"tests/compatibility/{__version__}.tar.gz")
SETTINGS = (
    "model.path=base model.dtype=float32 data.eval_rows=8 data.max_length=64 adapter.r=4 "
    "adapter.dropout=0.1 optimizer.lr=1e-2 train.max_updates=8 train.batch_size=4 "
    "train.eval_every=4 train.save_every=4 train.compile=false"
)
TRAIN = f"cera-train data=jsonl data.train_files=[rows.jsonl] {SETTINGS}"
COMMANDS = [
    f"{TRAIN} name=cera adapter=cera train.tasks=[held_out]",
    f"{TRAIN} name=lora adapter=lora",
    f"cera-train data=preferences data.train_files=[pairs.jsonl] data.layout=auto {SETTINGS} "
    "name=dpo adapter=cera adapter.dropout=0 train.objective=dpo",
    f"{TRAIN} name=sweep adapter=cera adapter.r=2,4 train.save_every=null -m",
    f"{TRAIN} +study=compared --config-dir conf train.save_every=null -m",
    "cera-eval run=outputs/cera task=held_out task.max_new_tokens=8",
    "cera-eval run=outputs/cera task=perplexity",
    "cera-export run=outputs/cera at_most=1",
    "cera-report outputs/compared --output=report",
]
STUDY = """# @package _global_
defaults: [{override /hydra/sweeper: study}]
name: compared
study:
  arms: {lora: [adapter=lora], cera: [adapter=cera]}
  baseline: lora
  tune: {optimizer.lr: [0.005, 0.01]}
  seeds: 2
  outcomes: [loss]
"""


def main() -> None:
    if ARCHIVE.exists():
        sys.exit(f"{ARCHIVE} is made: a corpus is that of its release. Raise the version first.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_random(folder / "base", **SIZES)
        write_data(folder)
        study = folder / "conf" / "study" / "compared.yaml"
        study.parent.mkdir(parents=True)
        study.write_text(STUDY)
        for command in COMMANDS:
            run(command, folder)
        with tarfile.open(ARCHIVE, "w:gz") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name, filter=without_owner)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size / 1e6:.2f} MB")


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """A file of the archive, not of a user of this machine; None for a lock."""
    if member.name.endswith(".lock"):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def write_data(folder: Path) -> None:
    rows = random_rows(64, 8, ("question", "answer"), prompt=0.6, spread=0)
    pairs = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": " no"} for row in rows
    ]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "pairs.jsonl", pairs)


def run(command: str, folder: Path) -> None:
    """Runs a command as one who has the program on the path: no path of this machine is
    recorded."""
    program, *words = command.split()
    start = f"import sys; sys.argv[0] = {program!r}; from cera_train.cli.start import main; main()"
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path.cwd()),
    }
    subprocess.run(
        [sys.executable, "-c", start, *words],
        cwd=folder,
        env=os.environ | environment,
        check=True,
    )


if __name__ == "__main__":
    main()

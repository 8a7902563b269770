"""Sweeps that a test starts: a user's file, and jobs that train nothing."""

import json
from pathlib import Path

import pytest
import yaml
from made_sweeps import make_job

from cera_train.common.settings import to_plain
from cera_train.settings.run import Config


@pytest.fixture
def sweep_here(tmp_path, tiny_folder):
    """A working folder with a user's sweep file: two by two jobs, of which one is impossible."""
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    content = {
        "defaults": [{"override /protocol": "paper"}],
        "name": "tiny",
        "model": {"path": str(tiny_folder), "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"max_length": 256},
        "train": {"max_updates": 6, "batch_size": 16, "eval_every": None, "save_every": None},
        "hydra": {
            "sweeper": {"params": {"adapter": "lora,cera", "adapter.activation": "relu,silu"}}
        },
    }
    (tmp_path / "conf" / "sweep" / "tiny.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump(content)
    )
    return tmp_path


@pytest.fixture
def counted(monkeypatch) -> list[Config]:
    """The configs of the runs that were started. They train nothing and finish: the higher the
    rank, the lower the perplexity, and the accuracy too."""
    begun = []

    def launch(config: Config) -> dict:
        folder = Path(config.output_dir) / config.name
        rank = config.adapter.r
        result = {
            "updates": 20,
            "eval/perplexity": 1 + 1 / rank,
            "gsm8k/exact": 1 / rank,
            "seconds": 60.0 * rank,
        }
        if not (folder / "result.json").exists():
            begun.append(config)
            make_job(folder.parent, folder.name)
            (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
            (folder / "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr("cera_train.training.train.launch", launch)
    return begun

"""Jobs of a sweep that train nothing."""

import json
from pathlib import Path

import pytest
import yaml
from made_sweeps import make_job

from cera_train.common.settings import to_plain
from cera_train.settings.run import Config


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

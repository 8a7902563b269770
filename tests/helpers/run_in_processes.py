"""Runs several configs one after the other in each of torchrun's processes, which pay their imports once.

torchrun --nproc_per_node=2 run_in_processes.py OVERRIDES.json
"""

import json
import sys
from pathlib import Path

import hydra

from cera_train.cli.composition import register_configs, to_config
from cera_train.common.files import config_dir
from cera_train.training.train import train

register_configs()
for overrides in json.loads(Path(sys.argv[1]).read_text()):
    with hydra.initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
        config = to_config(hydra.compose("config", overrides))
    train(config)

"""Runs several configs one after the other in each of torchrun's processes, which pay their imports once.

torchrun --nproc_per_node=2 run_in_processes.py OVERRIDES.json
"""

import json
import sys
from pathlib import Path

from benchmarks.composed import composed
from cera_train.training.train import train

for overrides in json.loads(Path(sys.argv[1]).read_text()):
    train(composed(*overrides))

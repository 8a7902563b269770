"""What every command imports and parses: the process that forks them does so once."""

import gc

import life  # noqa: F401
from conftest import parse_configs_once

import cera_train.cli.plan
import cera_train.cli.runs
import cera_train.cli.train
import cera_train.evaluation.evaluate
import cera_train.planning.estimate
import cera_train.report.page
import cera_train.serving.chat
import cera_train.serving.export
import cera_train.training.train  # noqa: F401
from cera_train.cli.compose import compose

parse_configs_once()
compose()  # Hydra looks for its plugins
gc.collect()
gc.freeze()

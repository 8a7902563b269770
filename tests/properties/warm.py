"""What every command imports, parses and compiles: the process that forks them does so once."""

import gc

import life  # noqa: F401
from conftest import compute_once
from huggingface_hub import ModelCard, ModelCardData
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

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

compute_once()
compose()  # Hydra looks for its plugins
ModelCard.from_template(ModelCardData())
get_checkpoint_conversion_mapping("llama")  # builds those of all types
gc.collect()
gc.freeze()

"""Speed and memory against their targets: `python -m benchmarks`."""

import logging
import os

# Before any library reads them: no network, and no threads that a fork would lose.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported

WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a process that measures a CPU: a run of ours takes the GPU that it sees. It is set
before the process starts, or before its heavy imports, since CUDA reads it once and bitsandbytes
asks CUDA while it is imported."""

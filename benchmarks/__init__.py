"""Speed and memory against their targets: `python -m benchmarks`."""

import os

# Before any library reads them: no network, and no threads that a fork would lose.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

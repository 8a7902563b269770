"""Where something was measured: the processor and the commit, for the file of a picture."""

import re
import subprocess
from pathlib import Path

TREE = Path(__file__).parents[1]


def circumstances() -> dict[str, str]:
    """The processor's name, and the commit, with `-dirty` after it if files have changed since."""
    processors = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^(?:model name|CPU part)\s*: (.+)$", processors, re.MULTILINE)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=8", "--exclude=*"]
    done = subprocess.run(describe, cwd=TREE, capture_output=True, text=True, check=True)
    return {"processor": name[1] if name else "unknown", "commit": done.stdout.strip()}

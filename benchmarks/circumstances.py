"""Where something was measured: the processor and the commit, for the file of a picture."""

import re
import subprocess
from pathlib import Path

TREE = Path(__file__).parents[1]


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=TREE, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def circumstances() -> dict[str, str]:
    """The processor's name, and the commit, with `-dirty` after it if code has changed since."""
    processors = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^(?:model name|CPU part)\s*: (.+)$", processors, re.MULTILINE)
    commit = git("rev-parse", "--short=8", "HEAD")
    if git("diff", "HEAD", "--", "cera_train", "benchmarks"):
        commit += "-dirty"
    return {"processor": name[1] if name else "unknown", "commit": commit}

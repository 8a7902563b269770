"""A pytest plugin with real small file systems, which fill up or become read-only."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path):
    """disk(folder, "size=64k") mounts a small file system there; disk(folder, "remount,ro") changes it."""
    mounted = []

    def disk(folder: Path, options: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
            pytest.skip("mounting a file system needs root and its capability for it")
        if "remount" not in options:
            mounted.append(folder)
        return folder

    yield disk
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)

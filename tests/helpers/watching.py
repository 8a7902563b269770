"""`cera-watch` in this process, in a pipe, and in a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from cera_train.cli.watch import main

WATCH = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'cera-watch'\nfrom cera_train.cli.watch import main; main()",
]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*WATCH, str(folder), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


class Terminal:
    """A command in a terminal of its own, of 100 columns and 30 rows."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = subprocess.Popen(command, **streams, env=environment, preexec_fn=self._own)
        os.close(slave)
        self.output = ""

    @staticmethod
    def _own() -> None:
        """Makes the terminal the command's, so that Ctrl-C in it is a signal."""
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read_to(self, pattern: str | None) -> None:
        """Reads until a pattern has come; None: until the command has ended."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if pattern is not None and re.search(pattern, self.output):
                return
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # the last one has closed it
                    return
        raise AssertionError(self.output[-2000:])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    opened = Terminal(*command)
    try:
        yield opened
    finally:
        opened.close()


def cera_watch(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cera-watch", *map(str, arguments)])
    main()

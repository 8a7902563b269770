"""Proof, before a run costs anything, that every adapter runs and learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cera_train.cera.coverage import Coverage
from cera_train.common.errors import UserError
from cera_train.common.terminal import print_line

if TYPE_CHECKING:
    from cera_train.training.session import Session

TOKENS = 64
"""The pass takes a row of about this length for each process: attention matters in it, and it costs little."""


def prove_coverage(session: Session) -> None:
    """Runs one forward and backward pass over a few rows of the next update, and leaves no trace of it.

    Raises:
        UserError: an adapter did not run, or the loss does not depend on it.
    """
    coverage = Coverage(session.model)
    if not session.config.train.check_coverage or not coverage.layers:  # full fine-tuning has no adapters
        return
    team, batches = session.team, session.batches
    rows = session.order.sequences(session.progress.update)
    rows = sorted(rows, key=lambda row: abs(batches.lengths[row] - TOKENS))[: team.processes]
    passes = batches.passes(rows, team.processes, team.process, in_step=team.is_sharded)
    session.loss.train()
    with session.local_loss.uncompiled(), coverage.watch():
        for group, _ in passes:
            session.accelerator.backward(session.loss(batches.load(group)) / sum(batches.supervised[i] for i in group))
    session.optimizer.zero_grad()
    coverage.sum(team.reduce)
    if (problem := coverage.problem()) is not None:
        raise UserError(
            f"adapter.target_modules: {problem} Leave them out, with all-linear by "
            "adapter.settings.exclude_modules=[...], or set train.check_coverage=false."
        )
    if team.is_main and coverage.idle_experts:
        print_line("coverage", f"{coverage.idle_experts} experts got no token in the first rows: not proven yet")

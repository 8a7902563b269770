"""Proof, before a run costs anything, that every adapter runs and learns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from cera_train.cera.coverage import Coverage
from cera_train.common.errors import UserError
from cera_train.common.terminal import print_line

if TYPE_CHECKING:
    from cera_train.training.session import Session

TOKENS = 64
"""The pass takes a row of about this length for each process: attention matters in it, and it costs little."""


def prove_coverage(session: Session, backward: Callable[[Session, list[int]], torch.Tensor]) -> None:
    """Runs one forward and backward pass over a few rows of the next update, and leaves no trace of it.

    Raises:
        UserError: an adapter did not run, or the loss does not depend on it.
    """
    coverage = Coverage(session.model)
    if not session.config.train.check_coverage or not coverage.layers:  # full fine-tuning has no adapters
        return
    lengths, rows = session.batches.lengths, session.order.sequences(session.progress.update)
    rows = sorted(rows, key=lambda row: abs(lengths[row] - TOKENS))[: session.team.processes]
    eagerly = (
        torch.compiler.set_stance("force_eager") if session.held_out.loss.is_compiled else contextlib.nullcontext()
    )
    session.loss.train()
    with eagerly, coverage.watch():  # compiled layers call no hooks
        backward(session, rows)
    session.optimizer.zero_grad()
    coverage.sum(session.team.reduce)
    if (problem := coverage.problem()) is not None:
        raise UserError(f"adapter.target_modules: {problem} Leave them out, or set train.check_coverage=false.")
    if session.team.is_main and coverage.idle_experts:
        print_line("coverage", f"{coverage.idle_experts} experts got no token in the first rows: not proven yet")

"""Signals: remembered, passed on, handed over, and never lost."""

import contextlib
import os
import signal

import pytest

from cera_train.common.signals import SIGNALS, Interrupted, Interruption, first_heard


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def listeners():
    """Stands in for an earlier listener, such as submitit: the signals that it got."""
    got = []
    before = {
        number: signal.signal(number, lambda number, _: got.append(number)) for number in SIGNALS
    }
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_recorded_passed_on_and_delivered_at_the_end_if_nobody_handled_it(
    listeners, number
):
    passed_on = []
    with Interruption(pass_on=passed_on.append) as interruption:
        send(number)
        assert (interruption.signal, passed_on, listeners) == (number, [number], [])
        assert first_heard(interruption.heard()) == number
    assert listeners == [number]


def test_a_schedulers_signal_wins_over_others(listeners):
    """Slurm also sends SIGTERM, but only the other signal requeues the job."""
    with contextlib.suppress(Interrupted), Interruption() as interruption:
        send(signal.SIGTERM)
        send(signal.SIGUSR2)
        assert interruption.signal == signal.SIGUSR2
        send(signal.SIGINT)
        assert interruption.signal == signal.SIGUSR2
        raise Interrupted(interruption.signal)
    # A signal that was handled, here by the exception, is not delivered again.
    assert listeners == []


def test_a_second_signal_acts_at_once_but_a_duplicate_does_not(listeners, monkeypatch):
    with contextlib.suppress(Interrupted), Interruption() as interruption:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # a sender that signals every process signals us and our parent
        assert listeners == []
        monkeypatch.setattr("cera_train.common.signals.REPEAT_SECONDS", 0.0)
        send(signal.SIGTERM)
        assert listeners == [signal.SIGTERM]
        raise Interrupted(interruption.signal)


def test_the_listener_is_called_after_the_run_was_saved(listeners):
    Interrupted(signal.SIGTERM).hand_over()
    with pytest.raises(SystemExit) as exit_info:
        Interrupted(signal.SIGUSR2).hand_over()
    # Process 0 requeues the job; a failure of another process would end it first.
    assert exit_info.value.code == 0
    assert listeners == [signal.SIGTERM, signal.SIGUSR2]


def test_a_failing_listener_is_reported_with_its_reason(listeners):
    def refuse(number, frame):
        raise RuntimeError("timed out too many times.")

    signal.signal(signal.SIGUSR2, refuse)
    with pytest.raises(
        ValueError,
        match="timed out too many times. The same command resumes",
    ):
        Interrupted(signal.SIGUSR2).hand_over()

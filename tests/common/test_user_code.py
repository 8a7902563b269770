"""The wall around the user's code."""

import signal
import sys

import pytest

from cera_train.common.errors import UserError
from cera_train.common.signals import Interrupted
from cera_train.common.user_code import user_code


def leave() -> None:
    sys.exit(0)


def test_whatever_the_users_code_raises_is_one_line_with_its_place():
    line = leave.__code__.co_firstlineno + 1
    with pytest.raises(UserError) as caught, user_code("reward=x fails", "Fix it."):
        leave()
    assert str(caught.value) == f"reward=x fails: SystemExit: 0 ({__file__}:{line}). Fix it."


def test_a_signal_passes_the_wall():
    with pytest.raises(Interrupted), user_code("reward=x"):
        raise Interrupted(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), user_code("reward=x"):
        signal.raise_signal(signal.SIGINT)

"""What a run prints before it starts."""

from cera_train.settings.data import DataConfig
from cera_train.training.console import has_short_answers


def test_questions_and_answers_are_graded_and_chats_are_not():
    def is_graded(**settings) -> bool:
        return has_short_answers(DataConfig(path="x", **settings))

    answers = {"layout": "text", "prompt": "{question}", "completion": "{answer}"}
    assert is_graded(**answers)
    assert not is_graded(**answers, rejected="{worse}")
    assert not is_graded(layout="text", prompt="", completion="{text}")
    assert not is_graded(layout="messages")
    assert not is_graded(layout="documents")

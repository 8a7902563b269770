"""Rewards of GRPO: the grade of an answer, and functions of the user's. Imports no torch."""

import math
import pkgutil
from collections.abc import Callable

from cera_train.common.settings import require
from cera_train.common.user_code import user_code
from cera_train.data.rows import kind_of
from cera_train.evaluation.tasks.jsonl import TASK, gold_answer
from cera_train.runs.evaluation_folder import Generation, Problem
from cera_train.settings.evaluation import Grader

GRADER = "grpo.grader"

# Arguments: a prompt, an answer to it, and the row's answer.
Reward = Callable[[str, str, str], float]


def import_reward(path: str) -> Reward:
    """The reward of an import path. Raises UserError for anything but a function; the reward does
    for an error of the function, or a value that is no number."""
    place = f"grpo.rewards=[{path}]"
    fix = "Write module.function, and mind PYTHONPATH."
    with user_code(f"{place} cannot be imported", fix):
        function = pkgutil.resolve_name(path)
    require(callable(function), f"{place} is {kind_of(function)}, not a function. {fix}")

    def reward(prompt: str, answer: str, right: str) -> float:
        with user_code(f"{place} fails for the answer {answer[:60]!r}"):
            value = float(function(prompt, answer, right))
        require(
            math.isfinite(value),
            f"{place} gives {value} for the answer {answer[:60]!r}: return a finite number.",
        )
        return value

    return reward


# --- grades ---------------------------------------------------------------------------------------


def grade_by(grader: Grader) -> Reward:
    """1 for a right answer, as task=jsonl grades it by one of its graders."""
    task = TASK.graded_by(grader)

    def reward(prompt: str, answer: str, right: str) -> float:
        problem = Problem("", prompt, prompt, gold_answer(right, grader, GRADER))
        generation = Generation("", 0, answer, tokens=0, truncated=False)
        return float(task.grade(problem, generation).exact)

    return reward

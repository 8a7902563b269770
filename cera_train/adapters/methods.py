"""The methods of PEFT that the loop can train. Commands that check settings import this file inside
functions, since it imports PEFT."""

from peft import PeftConfig, PeftType
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from cera_train.common.settings import require


def config_class_of(method: str) -> type[PeftConfig]:
    """The config class of a method that the loop can train, by the name of its type."""
    place = f"adapter.method={method}"
    name = method.upper()
    classes = {kind.value: each for kind, each in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    choices = f"Choose one of {', '.join(usable_methods())}"
    require(name in classes, f"{place} is not a method of PEFT. {choices}.")
    reason = why_unusable(name)
    require(reason is None, f"{place}: {reason}. {choices}.")
    return classes[name]


def usable_methods() -> list[str]:
    """The names of the methods that the loop can train."""
    names = [kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING]
    return sorted(name for name in names if why_unusable(name) is None)


def why_unusable(method: str) -> str | None:
    """Why the loop cannot train a method, by the name of its type; None where it can. The loop
    calls the model inside PEFT's, and nothing between updates."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(method)]
    if issubclass(config_class, PromptLearningConfig):
        return "its virtual tokens have no place in rows, their layout and a cache"
    if not issubclass(tuner, BaseTuner):
        return "it rewrites the attention of a few models instead of adapting modules"
    # ADAMSS changes ranks only if use_asa says so
    if hasattr(tuner, "update_and_allocate") and getattr(config_class, "use_asa", True):
        return "it changes ranks between updates, by scores that no checkpoint keeps"
    if tuner.forward is not BaseTuner.forward:
        return "its forward around the model, with more than rows or a loss of its own, is not run"
    return None

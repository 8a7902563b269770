"""The runs of the paper and of published evidence keep their settings, whatever the defaults
become.

published_configs.yaml has them: of its first run every one, of another what differs from the first
run or, for an arm, from its study's first arm. A run that is not published stands in no line of
it."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cera_train.common.files import config_dir, options
from cera_train.common.settings import flatten, to_plain, word_of

PUBLISHED = yaml.safe_load(Path(__file__).with_name("published_configs.yaml").read_text())
FIRST = next(iter(PUBLISHED))
KNOWN = {key for settings in PUBLISHED.values() for key in settings}
"""The settings that there were: another came later, and its default leaves these runs as they
are."""


def runs_of_ours(compose) -> Iterator[tuple[str, str, list[str]]]:
    """Every recipe, every sweep with each choice of files, every arm of a study under its first
    condition: the run, the run that it is held against, and its overrides."""
    for name in options("recipe"):
        yield f"+recipe={name}", FIRST, [f"+recipe={name}"]
    for name in options("sweep"):
        file = yaml.safe_load((config_dir("conf") / "sweep" / f"{name}.yaml").read_text())
        swept = {
            key: values.split(",")
            for key, values in file["hydra"]["sweeper"]["params"].items()
            if "." not in key
        }
        for values in itertools.product(*swept.values()):
            words = [f"+sweep={name}", *map("=".join, zip(swept, values, strict=True))]
            yield " ".join(words), FIRST, words
    for name in options("study"):
        study = compose(f"+study={name}").study
        conditions = [f"{key}={word_of(values[0])}" for key, values in study.conditions.items()]
        first = FIRST
        for arm, words in study.arms.items():
            run = f"+study={name} study.arm={arm}"
            yield run, first, [f"+study={name}", *conditions, *words]
            first = run if first == FIRST else first


def settings_of(config: Any) -> dict[str, Any]:
    return {key: value for key, value in flatten(to_plain(config)).items() if key in KNOWN}


@pytest.mark.slow
def test_published_runs_keep_their_settings(compose):
    settings = {FIRST: settings_of(compose(FIRST))}
    differing = dict(settings)
    for run, other, words in runs_of_ours(compose):
        if run in PUBLISHED and run != FIRST:
            values = settings_of(compose(*words))
            others = settings[other]
            changed = {
                key for key in values.keys() | others.keys() if values.get(key) != others.get(key)
            }
            settings[run] = values
            differing[run] = {key: values.get(key) for key in sorted(changed)}
    assert differing == PUBLISHED

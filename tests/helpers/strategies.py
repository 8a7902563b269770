"""Hostile inputs, made by hypothesis: the same ones in every run, so that what fails here fails everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = 200
"""Inputs of each test."""

fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def result_or_value_error(function: Callable, *arguments: Any) -> Any:
    """The result, or None where there is an error that the user can mend."""
    with contextlib.suppress(ValueError):
        return function(*arguments)
    return None


texts = st.text(st.characters(exclude_categories=[]), max_size=30)
"""With control characters, and halves of surrogate pairs."""

numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([-0.0, 1e308, 5e-324, 2**31, 2**63, 2**64, -(10**30), 10**400])
)

scalars = st.one_of(st.none(), st.booleans(), numbers, texts)

json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)


@st.composite
def mutated(draw: Any, valid: bytes) -> bytes:
    """A valid file with bytes changed, left out, put in or cut off."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        change = draw(st.sampled_from(["set", "insert", "leave out", "cut", "repeat"]))
        if change == "set" and content:
            content[place] = draw(st.integers(0, 255))
        elif change == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        elif change == "leave out":
            del content[place : place + draw(st.integers(1, 16))]
        elif change == "repeat":
            content[place:place] = content[place : place + 16]
        elif draw(st.booleans()):
            del content[place:]
    return bytes(content)


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A tree of JSON with some value replaced by any other, or some key left out or added."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 3)) == 0:
        return draw(json_values)
    if isinstance(tree, list):
        place = draw(st.integers(0, len(tree) - 1))
        return [*tree[:place], draw(changed(tree[place])), *tree[place + 1 :]]
    key = draw(st.sampled_from(sorted(tree)))
    others = {name: value for name, value in tree.items() if name != key}
    change = draw(st.sampled_from(["value", "value", "value", "leave out", "add"]))
    if change == "leave out":
        return others
    return others | {draw(texts) if change == "add" else key: draw(changed(tree[key]))}

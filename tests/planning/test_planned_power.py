"""What a study can find, from standard deviations of the difference between two arms."""

from __future__ import annotations

import pytest

from cera_train.evaluation.power import detectable, needed
from cera_train.evaluation.verdict import Variances
from cera_train.planning.power import Power, pooled, variances_given
from cera_train.settings.planning import PlanConfig, SpreadConfig


def test_variances_are_squares_of_what_is_given():
    spread = SpreadConfig(seed={"loss": 0.003}, residual={"loss": 0.1, "math": 0.5})
    assert variances_given(spread) == {"loss": Variances(0.003**2, 0, 0.1**2), "math": Variances(0, 0, 0.5**2)}
    assert variances_given(SpreadConfig()) == {}


def test_the_smallest_difference_is_that_of_the_verdict():
    variances = Variances(0.003**2, 0.02**2, 0.1**2)
    power = Power("loss", 5, 1_319, 6, variances)
    assert power.detectable == detectable(variances, 5, 1_319, comparisons=6, power=0.8)
    assert power.needed(0.004) == needed(variances, 0.004, 5, 1_319, comparisons=6, power=0.8)
    assert power.spreads == pytest.approx([0.003, 0.02, 0.1])
    assert Power("loss", 1, 1_319, 6, variances).detectable == float("inf")


def test_contrasts_are_pooled_by_their_mean_variance():
    assert pooled([Variances(1.0, 2.0, 3.0), Variances(3.0, 4.0, 5.0)]) == Variances(2.0, 3.0, 4.0)


def test_what_is_given_has_to_make_sense():
    for wrong in ({"loss": -0.1}, {"loss": "small"}, 0.1):
        with pytest.raises(ValueError, match="plan.spread.seed=.*: expected outcomes and standard deviations, such as"):
            SpreadConfig(seed=wrong)
    with pytest.raises(ValueError, match="plan.variances=outputs/a and plan.spread: a study's variances"):
        PlanConfig(variances="outputs/a", spread=SpreadConfig(seed={"loss": 0.1}))

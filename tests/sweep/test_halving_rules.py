"""The rule of successive halving is Optuna's; who is compared with whom, and rules that cannot be."""

from __future__ import annotations

import math
import random

import pytest

from cera_train.common.errors import UserError
from cera_train.sweep.record import SweepRecord
from cera_train.sweep.rungs import Group, Rules, decide, goes_on, groups_of


def optunas(table: dict[str, list[float]], factor: int) -> list[set[str]]:
    """Who goes on at each rung by Optuna's pruner. Each candidate is judged when all others have come to its rung; the
    pruner by itself judges each when it comes."""
    optuna = pytest.importorskip("optuna", reason="pip install hydra-optuna-sweeper")
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
    rungs, alive = [], set(table)
    for rung in range(len(next(iter(table.values())))):
        passed = set()
        for name in alive:
            study = optuna.create_study(pruner=pruner)
            for other in table.keys() - {name}:
                reached = [at for at in range(rung + 1) if other in [set(table), *rungs][at]]
                attributes = {f"completed_rung_{at}": table[other][at] for at in reached}
                study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.PRUNED, system_attrs=attributes))
            trial, is_pruned = study.ask(), False
            for at in range(rung + 1):
                trial.report(table[name][at], factor**at)
                is_pruned = trial.should_prune()
            passed |= set() if is_pruned else {name}
        rungs.append(alive := passed)
    return rungs


def ours(table: dict[str, list[float]], factor: int) -> list[set[str]]:
    rungs, alive = [], list(table)
    for rung in range(len(next(iter(table.values())))):
        flags = goes_on([table[name][rung] for name in alive], factor)
        alive = [name for name, flag in zip(alive, flags, strict=True) if flag]
        rungs.append(set(alive))
    return rungs


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore")
def test_who_goes_on_is_who_optunas_pruner_lets_go_on(seed):
    draw = random.Random(seed)
    count, factor = draw.randint(2, 9), draw.choice([2, 2, 3])
    losses = [1.0, 1.5, 2.0] if seed % 3 == 0 else [draw.random() for _ in range(100)]  # a few values: ties
    table = {f"lr={number}": [draw.choice(losses) for _ in range(3)] for number in range(count)}
    for name in draw.sample(list(table), (count - 1) // 2):  # the failed, which report an infinite loss
        table[name] = [math.inf] * 3
    assert ours(table, factor) == optunas(table, factor)


@pytest.mark.parametrize(
    ("losses", "flags"),
    [
        ([3.0, 1.0, 2.0, 4.0], "0110"),
        ([3.0, 1.0, 2.0, 4.0, 5.0], "01100"),  # the better half is at most half
        ([2.0, 1.0, 1.0], "011"),  # a tie decides nothing
        ([math.inf, 1.0, math.inf, math.inf], "0100"),  # a failed one never goes on
        ([math.inf, math.inf], "00"),
    ],
)
def test_the_better_half_goes_on(losses, flags):
    assert goes_on(losses, 2) == [flag == "1" for flag in flags]


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("count", range(1, 10))
def test_planned_courses_are_those_that_the_rule_leads_to(count, factor):
    rules, updates, draw = Rules(["optimizer.lr"], 5, factor), 42, random.Random(count)
    trained, alive, rung = dict.fromkeys(range(count), 0), list(range(count)), 1
    while len(alive) > 1 and rules.update(rung) < updates:  # as `Halving.sweep` goes on
        trained |= dict.fromkeys(alive, rules.update(rung))
        flags = goes_on([draw.random() for _ in alive], factor)
        alive, rung = [number for number, flag in zip(alive, flags, strict=True) if flag], rung + 1
    trained |= dict.fromkeys(alive, updates)
    planned = [
        updates if course.is_whole else course.rungs[-1]
        for course in rules.courses(count, updates)
        for _ in range(course.candidates)
    ]
    assert planned == sorted(trained.values())
    assert rules.courses(count, updates)[-1].rungs == tuple(map(rules.update, range(1, rung)))


def group_of(*seeds: int) -> Group:
    words = [[f"optimizer.lr={lr}", f"train.seed={seed}"] for lr in (1, 2) for seed in seeds]
    jobs = [{"name": ",".join(job), "overrides": job} for job in words]
    (group,) = groups_of(SweepRecord(["optimizer.lr", "train.seed"], jobs), ["optimizer.lr"])
    return group


def test_the_loss_of_a_candidate_is_its_mean_over_seeds():
    losses = [1.0, 3.0, 1.5, 1.7]  # lr=1 has the best single seed
    decision = decide(group_of(1, 2), 1, 20, dict(zip(group_of(1, 2).jobs, losses, strict=True)), 2)
    assert [(outcome.loss, outcome.goes_on) for outcome in decision.candidates] == [(2.0, False), (1.6, True)]
    losses[3] = math.inf  # one failed seed is a failed candidate
    decision = decide(group_of(1, 2), 1, 20, dict(zip(group_of(1, 2).jobs, losses, strict=True)), 2)
    assert [outcome.goes_on for outcome in decision.candidates] == [True, False]


def test_groups_are_what_is_neither_tuned_nor_a_seed():
    jobs = [
        [f"adapter={adapter}", f"adapter.r={r}", f"optimizer.lr={lr}", f"train.seed={seed}", "train.keep=1"]
        for adapter in ("cera", "lora") for r in (4, 8) for lr in (1, 2, 3) for seed in (0, 1)
    ]  # fmt: skip
    swept = ["adapter", "adapter.r", "optimizer.lr", "train.seed"]
    record = SweepRecord(swept, [{"name": ",".join(job), "overrides": job} for job in jobs])
    groups = groups_of(record, ["optimizer.lr"])
    assert [group.name for group in groups] == [
        f"adapter={adapter},adapter.r={r}" for adapter in ("cera", "lora") for r in (4, 8)
    ]
    assert [[candidate.name for candidate in group.candidates] for group in groups] == [
        ["optimizer.lr=1", "optimizer.lr=2", "optimizer.lr=3"]
    ] * 4
    assert {len(candidate.jobs) for group in groups for candidate in group.candidates} == {2}
    assert [group.name for group in groups_of(record, ["optimizer.lr", "adapter.r"])] == [
        "adapter=cera",
        "adapter=lora",
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (dict(tune=[]), r"hydra.sweeper.tune=\[\]: name what is tuned"),
        (dict(tune=["adapter"]), "tune=adapter: methods are not compared"),
        (dict(tune=["data"]), "tune=data: losses of different models or rows cannot be compared"),
        (dict(tune=["model.path"]), "tune=model.path: losses of different models or rows cannot be compared"),
        (dict(tune=["train.seed"]), "tune=train.seed: the loss of a candidate is its mean over seeds"),
        (dict(first=0), "hydra.sweeper.first=0: expected the updates"),
        (dict(first="abc"), "hydra.sweeper.first=abc: expected the updates"),
        (dict(factor=1), "hydra.sweeper.factor=1: expected 2 or more"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        Rules(**{"tune": ["optimizer.lr"], "first": 20, "factor": 2} | rules)

"""The sentences of a study's page: one test for each way a verdict can come out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from cera_train.evaluation.slope import slope
from cera_train.evaluation.verdict import Contrast, Variances
from cera_train.report.study.cells import CellResult, Outcome, Values
from cera_train.report.study.contrasts import Comparison, RankLine, SlopeGap, slope_gaps
from cera_train.report.study.tables import contrast_table
from cera_train.report.study.words import changes, plateau, protocol, sizes, unequal_times, verdicts
from cera_train.settings.sweep import StudyConfig
from cera_train.sweep.study import Cell

LOSS = Outcome("loss", matters=0.01)
BETTER = (-0.012, -0.02, -0.004)
WORSE = (0.012, 0.004, 0.02)
NOTHING = (-0.006, -0.018, 0.006)
TINY = (-0.001, -0.003, 0.001)


def cell(arm: str, r: int | None = 16, task: str = "", lr: str = "0.001", **more: str) -> CellResult:
    choices = {} if r is None else {"adapter.r": str(r)}
    values = {name: Values(np.zeros((3, 20)), range(20)) for name in ("loss", "gsm8k")}
    return CellResult(Cell(arm, task, choices, {"optimizer.lr": lr} | more, {}), {}, values, {}, [])


def compare(
    measured: tuple[float, float, float],
    verdict: str = "not shown",
    r: int | None = 16,
    *,
    outcome: Outcome = LOSS,
    arms: tuple[str, str] = ("lora", "cera"),
    asked: str = "cera or lora",
    task: str = "",
    detectable: float = 0.015,
    needed: Any = (9, 5200),
    reason: str = "",
) -> Comparison:
    found = Contrast(*measured, p_value=0.01, variances=Variances(0, 0, 0), seeds=3, problems=20, reason=reason)
    first, second = (cell(arm, r, task) for arm in arms)
    return Comparison(outcome, asked, first, second, found, 0.02, verdict, detectable, needed)


def test_the_verdict_is_one_sentence_over_all_conditions() -> None:
    (sentence,) = verdicts([compare(NOTHING, r=16), compare(BETTER, "better", r=64)], {})
    assert sentence == (
        "CeRA is better than LoRA at r = 64 by 0.0120 nats (95 % 0.0040 to 0.0200), not shown at r = 16: the smallest "
        "difference this design could show is 0.0150 nats."
    )


def test_better_at_one_rank_and_worse_at_another() -> None:
    own = [compare(BETTER, "better", r=64), compare(WORSE, "worse", r=4), compare(NOTHING, r=16, detectable=0.02)]
    (sentence,) = verdicts([*own, compare(NOTHING, r=32)], {})
    assert sentence == (
        "CeRA is better than LoRA at r = 64 by 0.0120 nats (95 % 0.0040 to 0.0200), worse at r = 4 by 0.0120 nats "
        "(95 % 0.0040 to 0.0200), not shown at r = 16 and at r = 32: the smallest difference this design could show is "
        "0.0150 to 0.0200 nats."
    )


def test_nothing_shown() -> None:
    assert verdicts([compare(NOTHING, r=None)], {}) == [
        "CeRA is not shown to be better or worse than LoRA: the smallest difference this design could show is 0.0150 "
        "nats."
    ]


def test_nothing_shown_and_nothing_that_matters() -> None:
    (sentence,) = verdicts([compare(TINY)], {})
    assert sentence.endswith(", and any difference is less than the 0.0100 that would matter.")


def test_shown_and_less_than_what_matters() -> None:
    (sentence,) = verdicts([compare((-0.002, -0.003, -0.001), "better")], {})
    assert sentence == (
        "CeRA is better than LoRA at r = 16 by 0.0020 nats (95 % 0.0010 to 0.0030, less than the 0.0100 that would "
        "matter)."
    )


def test_one_seed_is_no_verdict() -> None:
    own = compare((-0.5, -math.inf, math.inf), detectable=math.inf, needed=(None, None), reason="one seed")
    assert verdicts([own], {}) == ["CeRA against LoRA: not shown: one seed."]


def test_a_share_cannot_differ_by_more_than_one() -> None:
    own = [compare(NOTHING, outcome=Outcome("gsm8k"), detectable=size) for size in (1.74, 0.5)]
    unshowable, showable = (verdicts([each], {})[0] for each in own)
    assert unshowable.endswith(" at r = 16: no difference could be shown with 3 seeds.")
    assert showable.endswith("the smallest difference this design could show is 50.0 points.")
    columns = {column.label: column.cells for column in contrast_table(own, {}).columns}
    assert [cell.text for cell in columns["smallest that could be shown"]] == ["none", "50.0 points"]


def test_the_score_of_a_task_is_in_points() -> None:
    gsm8k = Outcome("gsm8k")
    (sentence,) = verdicts([compare((0.021, 0.004, 0.038), "better", outcome=gsm8k, task="sums")], {})
    assert sentence == "On GSM8K, CeRA is better than LoRA on sums at r = 16 by 2.1 points (95 % 0.4 to 3.8)."
    (sentence,) = verdicts([compare((0.021, 0.004, 0.038), "better", outcome=Outcome("score"), task="sums")], {})
    assert sentence == "CeRA is better than LoRA on sums at r = 16 by 2.1 points (95 % 0.4 to 3.8)."


def test_every_two_arms_have_a_sentence_in_every_outcome() -> None:
    own = [
        compare(BETTER, "better", arms=("identity", "cera"), asked="the gate"),
        compare(NOTHING),
        compare(NOTHING, arms=("identity", "cera"), asked="the gate", outcome=Outcome("gsm8k")),
        compare(NOTHING, outcome=Outcome("gsm8k")),
    ]
    assert [sentence.partition(" is ")[0] for sentence in verdicts(own, ["the gate"])] == [
        "the gate: CeRA", "CeRA", "the gate: On GSM8K, CeRA", "On GSM8K, CeRA",
    ]  # fmt: skip


# --- what would change it --------------------------------------------------------------------------------------------


def test_what_would_show_a_difference() -> None:
    own = compare(NOTHING)
    assert sizes(own) == "9 seeds on 20 rows or 5,200 rows with 3 seeds"
    assert sizes(replace(own, needed=(9, None))) == "9 seeds on 20 rows"
    assert sizes(replace(own, needed=(None, None))) == "no number of seeds or rows alone"


def test_what_would_change_the_verdict() -> None:
    own = [compare(NOTHING), compare(BETTER, "better", r=64)]
    cells = [cell("cera", 64, lr="0.01", **{"adapter.dropout": "0.1"}), cell("lora")]
    tune = {"optimizer.lr": [1e-4, 1e-3, 1e-2], "adapter.dropout": [0.1], "optimizer.kind": ["adamw", "adamw_8bit"]}
    lines = changes(own, cells, tune, "SmolLM2")
    assert lines == [
        "CeRA − LoRA, r = 16: the observed −0.0060 nats would be shown by 9 seeds on 20 rows or 5,200 rows with 3 "
        "seeds; 0 of 3 seeds have the sign of the mean.",
        "CeRA − LoRA, r = 64: shown; its interval ends 0.0040 nats from zero, and 0 of 3 seeds have the sign of the "
        "mean.",
        "A wider grid of tuned values: the value chosen is the last one tried for CeRA, r = 64 (lr = 0.01).",
        "Another setting: nothing here tells about other models, rows or lengths than SmolLM2.",
    ]


def test_one_seed_asks_for_more() -> None:
    own = compare((-0.5, -math.inf, math.inf), needed=(None, None), reason="one seed")
    assert changes([own], [], {}, "SmolLM2")[0].startswith("One seed.")


# --- the plateau -----------------------------------------------------------------------------------------------------


def line(arm: str, means: list[float], spread: float = 0.001, seeds: int = 3) -> RankLine:
    noise = [spread * (seed - (seeds - 1) / 2) for seed in range(seeds)]
    values = [[mean + noise[(seed + rank) % seeds] for seed in range(seeds)] for rank, mean in enumerate(means)]
    found = slope([2.0, 4.0, 6.0][: len(means)], values)
    return RankLine(LOSS, arm, "", arm.lower(), [4, 16, 64][: len(means)], found)


def test_the_plateau_in_words() -> None:
    lora, cera = line("LoRA", [2.0, 1.9, 1.9]), line("CeRA", [2.0, 1.9, 1.8])
    texts = plateau([lora, cera], slope_gaps([("lora", "cera")], {("lora", ""): lora, ("cera", ""): cera}))
    assert texts[0].startswith("LoRA: gains +0.0250 nats per doubling (95 % +0.02")
    assert texts[0].endswith("; from r = 16 on no change is shown, and there is none of 0.0100, which would matter.")
    assert texts[1].startswith("CeRA: gains +0.0500 nats per doubling")
    assert texts[1].endswith("; it changes up to r = 64.")
    assert texts[2].startswith("CeRA against LoRA: gains +0.0250 nats per doubling (95 % +0.02")


def test_a_plateau_that_is_only_not_shown() -> None:
    (text,) = plateau([line("LoRA", [2.0, 1.99, 1.98], spread=0.04)], [])
    assert text.endswith("; from r = 4 on no change is shown.")


def test_slopes_that_are_not_shown_to_differ() -> None:
    lora, cera = line("LoRA", [2.0, 1.9, 1.8], 0.05), line("CeRA", [2.0, 1.89, 1.79], -0.05)
    (text,) = plateau([], slope_gaps([("lora", "cera")], {("lora", ""): lora, ("cera", ""): cera}))
    assert text.endswith(" (not shown to differ).")


def test_the_slope_of_one_seed_has_no_interval() -> None:
    (text,) = plateau([line("LoRA", [2.0, 1.9], seeds=1)], [])
    assert text == "LoRA: gains +0.0500 nats per doubling; one seed cannot be generalised from."


# --- protocol --------------------------------------------------------------------------------------------------------


def test_the_protocol_names_how_values_were_chosen() -> None:
    config = StudyConfig(
        arms={"lora": [], "cera": []}, baseline="lora", tune={"optimizer.lr": [1e-3, 1e-2]}, first=10, seeds=3,
        outcomes=["loss", "gsm8k"],
    )  # fmt: skip
    text = "\n".join(protocol(config, 6))
    assert "Arms of one condition have the same parameters." in text
    assert "on seed 0: optimizer.lr: 0.001, 0.01." in text
    assert "3 seeds at the chosen values, seed 0 among them: 6 runs" in text
    assert "Others: gsm8k." in text
    text = "\n".join(protocol(replace(config, tune_seeds=2), 6))
    assert "on seeds 0 to 1: optimizer.lr: 0.001, 0.01." in text
    assert "3 seeds at the chosen values, seeds 0 to 1 among them: 6 runs" in text


class Timed(CellResult):
    """A cell whose runs took some time."""

    def figure(self, name: str) -> float | None:
        return {"seconds": len(self.cell.arm) * 30.0}[name]


def test_arms_that_took_unequal_times_are_named() -> None:
    cells = [Timed(cell(arm, r).cell, {}, {}, {}, []) for r in (16, 64) for arm in ("lora", "identity")]
    assert unequal_times(cells) == "at r = 16 the runs took LoRA 120 s, identity 240 s"
    assert not unequal_times([own for own in cells if own.cell.arm == "lora"])


def test_a_gap_belongs_to_arms_under_the_same_conditions() -> None:
    lora, cera = line("LoRA", [2.0, 1.9]), line("CeRA", [2.0, 1.8])
    gaps = slope_gaps([("lora", "cera")], {("lora", "sums"): lora, ("cera", "maps"): cera})
    assert gaps == []
    assert isinstance(slope_gaps([("lora", "cera")], {("lora", ""): lora, ("cera", ""): cera})[0], SlopeGap)

"""What a study's page says about runs whose losses are known."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from made_files import change_json

from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.runs.results import LOSSES_AFTER, GradedProblem, TokenLosses, write_grades
from cera_train.study.cells import Outcome
from cera_train.study.page import write_studies
from cera_train.study.results import contrasts_of
from cera_train.verdicts.contrast import contrast


def loss_by_rank(values: dict[str, str]) -> float:
    """CeRA gains 0.05 nats at r = 64, and LoRA nothing."""
    is_better = values["study.arm"] == "cera" and values["adapter.r"] == "64"
    rate = 0.02 * (values["optimizer.lr"] != "0.001")
    return 1 - 0.05 * is_better + rate + 0.001 * int(values["train.seed"])


def test_rows_without_tokens_are_left_out_and_a_loss_that_is_no_number_is_refused(tmp_path):
    losses = np.array([1, 2, 3], dtype="float32")
    TokenLosses(np.array([2, 0, 1]), losses).write(tmp_path / LOSSES_AFTER)
    outcome = Outcome.read("loss", tmp_path)
    assert (outcome.values.tolist(), outcome.mean) == ([1.5, 3], 2)
    TokenLosses(np.array([3]), losses * np.nan).write(tmp_path / LOSSES_AFTER)
    with pytest.raises(UserError, match="a loss is not a number"):
        Outcome.read("loss", tmp_path)


RANKS = {"conditions": {"adapter.r": [16, 64]}, "seeds": 3}


def test_arms_that_did_not_run_count_for_holm(make_study):
    """Otherwise dropping arms could flip a verdict."""
    [(both,)] = contrasts_of(make_study(seeds=3))
    arms = {name: [f"adapter={name}"] for name in ("lora", "cera", "dora", "hira")}
    study = make_study(seeds=3)
    study = replace(study, record=study.record.replace(study=study.record.study | {"arms": arms}))
    [(planned,)] = contrasts_of(study)
    assert planned.p_holm == pytest.approx(min(1.0, 3 * both.p_holm))
    assert planned.detectable > both.detectable


def test_higher_scores_are_better_and_the_first_outcome_chooses_the_rate(make_study):
    study = make_study(
        lambda values: float(values["optimizer.lr"]),
        lambda values: (
            (0.9 if values["study.arm"] == "cera" else 0.3)
            - 0.2 * (values["optimizer.lr"] != "0.001")
        ),
        outcomes=["gsm8k", "loss"],
        seeds=3,
    )
    assert [cell.chosen.values for cell in study.cells] == [{"optimizer.lr": "0.001"}] * 2
    [comparisons] = contrasts_of(study)
    assert [(each.outcome, each.verdict) for each in comparisons] == [
        ("gsm8k", "better"),
        ("loss", "not shown"),
    ]


def test_a_best_value_at_the_end_of_its_grid_allows_no_verdict(make_study):
    def loss(values: dict[str, str]) -> float:
        best = "0.003" if values["study.arm"] == "cera" else "0.001"
        return 1 - 0.5 * (values["study.arm"] == "cera") + 0.02 * (values["optimizer.lr"] != best)

    study = make_study(loss)
    [(comparison,)] = contrasts_of(study)
    assert comparison.verdict == "not shown"
    assert comparison.p_holm < 0.05
    assert comparison.obstacles == ["cera at the largest optimizer.lr, 0.003"]


@pytest.mark.parametrize(("broken", "gain"), [("0.003", 0.3 / 4), ("0.001", 0.2 + 0.3 / 4)])
def test_what_a_value_of_the_grid_or_between_could_gain_widens_the_interval(
    make_study, broken, gain
):
    """One run breaks down: at a neighbour, which bends no parabola, or at the best value, which
    then is not chosen."""
    losses = {"0.0003": 0.5, "0.001": 0.1, "0.003": 0.3}  # the neighbours are 0.3 higher on average

    def loss(values):
        is_broken = values["optimizer.lr"] == broken and values["train.seed"] == "1"
        return losses[values["optimizer.lr"]] + 0.05 * (values["study.arm"] == "cera") + is_broken

    study = make_study(loss, seeds=3)
    first, second = study.cells
    [(comparison,)] = contrasts_of(study)
    between = max(first.grid_slack, second.grid_slack)
    assert between == pytest.approx(gain, abs=0.01)
    plain = contrast(first.values("loss"), second.values("loss"), first.weights("loss"))
    assert (comparison.lower, comparison.upper) == pytest.approx(
        (plain.lower - between, plain.upper + between)
    )
    assert plain.p_value < 0.05 < comparison.p_value


FOUR = {"lora_qv": [], "cera_qv": [], "lora_all": [], "cera_all": []}


def gain_at_qv(values: dict[str, str]) -> float:
    """CeRA gains 0.05 nats at q and v, and nothing at all layers; seeds differ by 0.1."""
    gain = 0.05 * (values["study.arm"] == "cera_qv")
    noise = 0.001 * int(values["train.seed"]) * (values["study.arm"] == "lora_all")
    rate = 0.02 * (values["optimizer.lr"] != "0.001")
    return 1 - gain + noise + rate + 0.1 * int(values["train.seed"])


def test_two_differences_are_compared_seed_by_seed(make_study):
    sides = [["lora_all", "cera_all"], ["lora_qv", "cera_qv"]]
    contrasts = {"only at q, v": sides}
    study = make_study(gain_at_qv, arms=FOUR, baseline=None, contrasts=contrasts, seeds=3)
    [(only,)] = contrasts_of(study)
    assert (only.second, only.first) == ("(cera_qv - lora_qv)", "(cera_all - lora_all)")
    assert only.by_seed == pytest.approx([-0.05, -0.049, -0.048], abs=1e-6)
    assert only.verdict == "better"
    # Each of the four arms is compared at its best rate, and two of them may gain on each side.
    assert only.between == pytest.approx(2 * study.cells[0].grid_slack)


def by_base(values: dict[str, str]) -> float:
    """CeRA gains 0.02, 0.05 and 0.08 nats on the bases; the best rate of one base differs."""
    number = int(values["study.base"][1])
    gain = (0.02 + 0.03 * number) * (values["study.arm"] == "cera")
    best = 0.003 if number == 2 else 0.001
    return 1 + number - gain + 0.001 * abs(float(values["optimizer.lr"]) / best - 1)


def test_with_bases_the_interval_is_students_over_bases(make_study):
    bases = {f"b{number}": [f"model.path={number}"] for number in range(3)}
    study = make_study(by_base, bases=bases, seeds=2)
    assert [cell.chosen.values for cell in study.cells] == [{"optimizer.lr": "0.001"}] * 2
    [(contrast,)] = contrasts_of(study)
    assert contrast.by_seed == pytest.approx([-0.02, -0.05, -0.08], abs=1e-6)
    interval = scipy.stats.ttest_1samp(contrast.by_seed, 0).confidence_interval()
    assert (contrast.lower, contrast.upper) == pytest.approx(
        (interval.low - contrast.between, interval.high + contrast.between), abs=1e-6
    )


def test_equal_differences_of_scores_on_every_base_are_no_proof(make_study):
    """LoRA solves 40 of 80 problems on each base, CeRA 44 others."""
    bases = {f"b{number}": [f"model.path={number}"] for number in range(3)}
    study = make_study(bases=bases, seeds=1, outcomes=["gsm8k"], scores=lambda values: 0.5)
    solved = {"lora": np.arange(80) % 2, "cera": np.arange(80) < 44}
    for folder in study.folder.glob("adapter*"):
        is_solved = solved["cera" if "study.arm=cera" in folder.name else "lora"]
        problems = [GradedProblem(f"p{n}", float(is_solved[n]), "") for n in range(80)]
        write_grades(folder, "gsm8k", problems)
    [(contrast,)] = contrasts_of(study)
    assert contrast.by_seed == pytest.approx([0.05] * 3)
    variance = np.subtract(*map(np.int64, solved.values())).var(ddof=1)
    half = scipy.stats.t.ppf(0.975, 79) * math.sqrt(variance / 240)
    assert (contrast.lower, contrast.upper) == pytest.approx((0.05 - half, 0.05 + half))


def test_a_value_that_was_alone_or_chosen_by_another_outcome_allows_no_verdict(make_study):
    def loss(values):
        return (
            1 - 0.5 * (values["study.arm"] == "cera") + 0.02 * (values["optimizer.lr"] != "0.001")
        )

    def scores(values):
        return 0.9 if values["study.arm"] == "cera" else 0.1

    both = {"outcomes": ["loss", "gsm8k"], "seeds": 3}
    [(first, second)] = contrasts_of(make_study(loss, scores, **both))
    assert (first.verdict, second.verdict) == ("better", "not shown")
    assert second.p_holm is None
    assert second.obstacles == ["values tuned by loss"]

    alone = {"tune": {"optimizer.lr": [1e-3]}}
    [(first, _)] = contrasts_of(make_study(loss, scores, name="alone", **both | alone))
    assert (first.verdict, len(first.obstacles)) == ("not shown", 2)


def test_a_study_of_earlier_settings_loads_where_none_was_used(make_study):
    unused = {
        "primary": [],
        "set_aside": 0.0,
        "slope": {},
        "tuned_elsewhere": None,
        "results": None,
    }
    study = make_study(**unused)
    assert contrasts_of(study)
    arms = study.record.study["arms"]
    for name, used in (
        ("study.primary", {"primary": ["the gate"]}),
        ("study.set_aside", {"set_aside": 0.5}),
        ("study.results", {"arms": arms | {"theirs": ["study.results=theirs"]}}),
    ):
        record = study.record.replace(study=study.record.study | used)
        with pytest.raises(UserError, match=f"{name}: cera-train 0.2.0 was the last that had it"):
            contrasts_of(replace(study, record=record))


def test_holm_corrects_over_the_studies_of_a_family(make_study, run_command, capsys):
    def loss(values):
        is_cera = values["study.arm"] == "cera"
        return loss_by_rank(values) + 0.01 * is_cera * int(values["train.seed"])

    studies = [make_study(loss, **RANKS, name=name) for name in ("a", "b")]
    _, alone = contrasts_of(studies[0])[0]
    _, together = contrasts_of(*studies)[1]
    assert 0 < alone.p_holm < 0.5
    assert together.p_holm == pytest.approx(min(1, 2 * alone.p_holm))
    assert together.detectable > alone.detectable
    assert run_command("cera-report", "outputs/a", "outputs/b") == 0
    assert re.search(r"not shown .* to \+0\.\d+ +0\.0\d+", capsys.readouterr().out)
    [one, other] = (read_json(Path(f"report/a_and_b/{name}/study_results.json")) for name in "ab")
    assert one["planned_contrasts"] == other["planned_contrasts"] == 4
    assert one["family"] == ["a", "b"]
    shutil.copytree("outputs/a", "elsewhere/a")
    assert run_command("cera-report", "outputs/a", "elsewhere/a") == 2
    assert "two of the studies have the name a: rename a folder" in capsys.readouterr().err


def test_the_page_opens_with_its_verdicts_and_has_numbers(make_study, run_command, capsys):
    make_study(loss_by_rank, **RANKS)
    assert run_command("cera-report", "outputs/which") == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"cera - lora +r = 64, loss +better +-0\.05\d\d +-0\.0\d+ to -0\.0\d+", printed
    )
    page = Path("report/which/report.md").read_text()
    assert "| optimizer.lr=0.001 |" in page
    assert page.index("![r = 16") < page.index("(verdicts.svg)") < page.index("## Verdicts")
    html = Path("report/which/report.html").read_text()
    assert html.index("<svg") < html.index("<table")
    results = read_json(Path("report/which/study_results.json"))
    assert [each["verdict"] for each in results["contrasts"]] == ["not shown", "better"]
    assert results["cells"][0]["losses"][0]["loss"] == pytest.approx([1.02, 1.021, 1.022])
    assert results["command"] == "cera-train -m +study=which"


def test_the_picture_has_a_row_for_every_contrast_of_the_first_outcome(make_study, tmp_path):
    """In units of what matters; by condition."""
    files = ["outputs/even.jsonl", "outputs/linear.jsonl"]

    def loss(values):
        is_better = values["study.arm"] == "cera" and "even" in values["data.train_files"]
        rate = 0.2 * (values["optimizer.lr"] != "0.001")
        return 1 - 0.5 * is_better + rate + 0.001 * int(values["train.seed"])

    study = make_study(
        loss,
        lambda values: 0.5,
        conditions={"data.train_files": files},
        outcomes=["loss", "gsm8k"],
        seeds=3,
        matters=0.1,
    )
    picture = write_studies([study], tmp_path / "report").verdicts
    assert [group.heading for group in picture.groups] == ["even", "linear"]
    assert picture.groups[0].note == "what matters: 0.1 nats"
    [even], [linear] = (group.rows for group in picture.groups)
    assert (even.label, even.mark, even.verdict) == ("cera - lora", "better", "better")
    assert even.difference == pytest.approx(-5, abs=0.1)
    assert even.repeats == pytest.approx([-5] * 3, abs=0.1)
    assert (linear.mark, linear.verdict) == ("too small", "too small")


def test_what_a_perfect_arm_would_gain_is_never_too_small(make_study, tmp_path):
    """LoRA's loss is 0.009, and 0.02 nats matter to the study."""

    def loss(values):
        rate = 0.02 * (values["optimizer.lr"] != "0.001")
        return 0.009 - 0.0085 * (values["study.arm"] == "cera") + rate

    study = make_study(loss, seeds=3, matters=0.02)
    [(contrast,)] = contrasts_of(study)
    assert -0.02 < contrast.lower < contrast.upper < 0.02
    assert contrast.matters == pytest.approx(0.0009)
    page = write_studies([study], tmp_path / "report")
    assert page.tables[0].rows[0]["verdict"] == contrast.verdict != "too small"
    [group] = page.verdicts.groups
    assert (group.note, group.rows[0].mark) == ("what matters: 0.0009 nats", contrast.verdict)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "environment.json",
            {"rows": {"train": "a", "held_out": "other"}},
            "had different held-out rows, and cannot be compared: ",
        ),
        ("environment.json", {"base_weights": "other"}, "had different base weights, and cannot"),
        (
            "result.json",
            {"trainable_parameters": 1248},
            "study.equal=parameters, but compared runs have 1,234 to 1,248. Tune no size",
        ),
    ],
)
def test_runs_of_other_rows_weights_or_sizes_are_not_compared(make_study, file, change, message):
    study = make_study()
    change_json(study.cells[1].runs[1].folder / file, change)
    with pytest.raises(UserError, match=message):
        contrasts_of(study)


def test_one_arm_has_nothing_to_compare(make_study):
    study = make_study()
    del study.cells[1]
    with pytest.raises(UserError, match="has no two arms to compare, only lora"):
        contrasts_of(study)

"""The page of a study: its files, what it refuses, and that a browser shows it soundly."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import HOSTILE
from made_studies import GAINS, make_study, records_of
from pages import sound_page

from cera_train.common.drawing import render
from cera_train.common.errors import UserError
from cera_train.report.study.page import StudyReport, report_study, say_study, write_study
from cera_train.report.study.results import results_of
from cera_train.runs.outcomes import LOSSES_AFTER, TokenLosses
from cera_train.settings.sweep import Equal

pytest_plugins = ("browser",)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> StudyReport:
    """Of four arms, two ranks, two outcomes, and a contrast of two arms beside the baseline."""
    folder = tmp_path_factory.mktemp("study")
    gains = GAINS | {(arm, r): 0.01 for arm in ("identity", "published") for r in (16, 64)}
    asked = {"the gate": ["identity", "cera"]}
    study = make_study(folder / "gate", gains, outcomes=["loss", "gsm8k"], contrasts=asked, seeds=5)
    return write_study(study, records_of(study), folder / "report")


def report_of(tmp_path: Path, **changes: Any) -> StudyReport:
    study = make_study(tmp_path / "gate", **changes)
    return report_study(study, records_of(study), tmp_path / "report")


def test_the_verdict_stands_first(written: StudyReport, capsys: pytest.CaptureFixture[str]) -> None:
    verdict, second, *_ = written.verdicts
    assert verdict.startswith("the gate: CeRA is better than identity at r = 64 by 0.0")
    assert re.fullmatch(
        r"CeRA is better than LoRA at r = 64 by 0\.0\d+ nats \(95 % 0\.0\d+ to 0\.0\d+\), not shown at r = 16: the "
        r"smallest difference this design could show is 0\.0\d+ nats, and any difference is less than the 0\.0100 "
        r"that would matter\.", second,
    )  # fmt: skip
    html, text = ((written.output / name).read_text() for name in ("report.html", "report.md"))
    assert html.index(verdict) < html.index("<table")
    assert text.splitlines()[2] == f"**{verdict}**"
    say_study(written)
    shown = capsys.readouterr().out
    assert " ".join(shown.split()).startswith(verdict)
    assert max(len(line) for line in shown.splitlines() if str(written.output) not in line) <= 100
    assert "what would change the verdict" in shown


def test_unequal_times_get_no_verdict_where_they_should_be_equal(tmp_path: Path) -> None:
    study = make_study(tmp_path / "gate", equal=Equal.time)
    report_study(study, records_of(study), tmp_path / "report")
    for path in tmp_path.rglob("study.arm=cera*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 9_999.0}))
    refused = r"study\.equal=time, and at r = 16 the runs took CeRA 9,999 s, LoRA [\d,]+ s\. .*study\.equal=none"
    with pytest.raises(UserError, match=refused):
        report_study(study, records_of(study), tmp_path / "report")
    without_claim = replace(study, config=replace(study.config, equal=Equal.none))
    report_study(without_claim, records_of(study), tmp_path / "report")


def test_the_page_has_its_tables_and_four_pictures(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert [table.title for table in report.tables] == ["Contrasts", "Cells", "Loss by the difficulty of a token"]
    assert [picture.name for picture in report.pictures] == ["differences-loss", "outcome-rank", "why", "difficulty"]
    contrasts, cells, difficulty = report.tables
    assert contrasts.names == ["CeRA − LoRA, r = 16", "CeRA − LoRA, r = 64"]
    columns = {column.label: column.cells for column in contrasts.columns}
    assert [cell.text for cell in columns["verdict"]] == ["not shown", "better"]
    assert columns["would show it"][1].value is None
    assert re.fullmatch(r"[+−]0\.\d{4} to [+−]?0\.\d{4}", columns["difference"][1].notes[0])
    assert cells.names == ["CeRA, r = 16", "LoRA, r = 16", "CeRA, r = 64", "LoRA, r = 64"]
    columns = {column.label: column.cells for column in cells.columns}
    assert columns["chosen"][0].text == "lr = 0.001"
    assert [cell.text for cell in columns["linear share"][:2]] == ["80.0%", "100.0%"]
    assert "gamma" not in columns
    assert difficulty.names == ["untouched base model", *cells.names]
    assert len(difficulty.columns) == 5


def test_failures_are_apart_where_there_are_tasks(tmp_path: Path) -> None:
    report = report_of(tmp_path, outcomes=["gsm8k"], samples=4)
    titles = [table.title for table in report.tables]
    assert titles == ["Contrasts", "Cells", "Failures apart: GSM8K", "pass@k: GSM8K"]
    assert [picture.name for picture in report.pictures] == [
        "differences-gsm8k",
        "outcome-rank",
        "why",
        "failures-gsm8k",
    ]
    endings, passed = report.tables[2:]
    shares = [[float(column.cells[row].text.rstrip("%")) for column in endings.columns] for row in range(4)]
    assert [sum(row) for row in shares] == pytest.approx([100] * 4, abs=0.3)
    assert [column.label for column in passed.columns] == ["pass@1", "pass@4"]


def test_a_study_of_tasks_compares_within_each(tmp_path: Path) -> None:
    report = report_of(tmp_path, tasks=("sums", "maps"), outcomes=["score", "loss"])
    assert [own.condition for own in report.comparisons[:4]] == [
        "sums, r = 16", "sums, r = 64", "maps, r = 16", "maps, r = 64",
    ]  # fmt: skip
    assert [own.task for own in report.difficulties] == ["sums", "maps"]
    assert len({picture.name for picture in report.pictures}) == len(report.pictures)


def test_a_picture_that_the_study_cannot_have_is_named(tmp_path: Path) -> None:
    report = report_of(tmp_path, gains={("lora", 16): 0.0, ("cera", 16): 0.01})
    assert report.not_shown == ["Against the rank: the rank is no condition of this study."]
    assert report.plateau == []


def test_one_seed_is_a_page_without_a_verdict(tmp_path: Path) -> None:
    report = report_of(tmp_path, seeds=1)
    assert report.verdicts == [
        "CeRA against LoRA: not shown: one seed an arm: what another seed changes is unknown; run at least two, better "
        "five."
    ]
    columns = {column.label: column.cells for column in report.tables[0].columns}
    assert columns["verdict"][0].notes == ("one seed an arm",)
    assert not columns.keys() & {"p after Holm", "smallest that could be shown", "would show it"}
    assert json.loads(results_of(report))["contrasts"][0]["interval"] == [None, None]
    for picture in report.pictures:
        render(picture, "svg")


def test_an_unfinished_study_is_refused_with_the_command_that_goes_on(tmp_path: Path) -> None:
    study = make_study(tmp_path / "gate")
    (next(iter(study.cells[0].runs.values())) / "result.json").unlink()
    study = replace(study, cells=[study.cells[0], replace(study.cells[1], chosen=None, runs={}), *study.cells[2:]])
    with pytest.raises(UserError) as refusal:
        report_study(study, records_of(study), tmp_path / "report")
    text = str(refusal.value)
    assert re.search(r"is an unfinished study: .+: no result of seed 0, and 1 more\. cera-train -m \+study=gate ", text)


def test_one_arm_of_a_study_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path / "gate")
    alone = replace(study, cells=[cell for cell in study.cells if cell.arm == "cera"])
    with pytest.raises(UserError, match=r"no two arms to compare, only cera\. .*cera-report .*gate/\* compares"):
        report_study(alone, records_of(study), tmp_path / "report")


def test_arms_without_the_baseline_have_no_gain_over_it(tmp_path: Path) -> None:
    gains = {(arm, 16): 0.0 for arm in ("lora", "identity", "cera")}
    study = make_study(tmp_path / "gate", gains, contrasts={"the gate": ["identity", "cera"]})
    study = replace(study, cells=[cell for cell in study.cells if cell.arm != "lora"])
    report = write_study(study, records_of(study), tmp_path / "report")
    assert "Difficulty: no run of the baseline, lora." in report.not_shown
    say_study(report)


def test_a_list_that_was_tuned_is_written_as_given(tmp_path: Path) -> None:
    study = make_study(tmp_path / "gate", chosen={"adapter.target_modules": "[q_proj,v_proj]"})
    report = report_study(study, records_of(study), tmp_path / "report")
    assert any("'adapter.target_modules=[q_proj,v_proj]'" in command for command in report.by_hand.values())


def test_seeds_on_other_rows_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path / "gate")
    other = make_study(tmp_path / "other", problems=60)
    shutil.copy(other.cells[0].runs[0] / LOSSES_AFTER, study.cells[0].runs[1])
    with pytest.raises(UserError, match="were measured on different held-out rows"):
        report_study(study, records_of(study), tmp_path / "report")
    for seed in (0, 2):
        shutil.copy(other.cells[0].runs[0] / LOSSES_AFTER, study.cells[0].runs[seed])
    with pytest.raises(UserError, match="were measured on different held-out rows"):
        report_study(study, records_of(study), tmp_path / "report")


def test_a_seed_that_diverged_is_refused_by_name(tmp_path: Path) -> None:
    study = make_study(tmp_path / "gate")
    run = study.cells[2].runs[1]
    losses = TokenLosses.read(run / LOSSES_AFTER)
    losses.losses[5] = float("nan")
    losses.write(run / LOSSES_AFTER)
    with pytest.raises(UserError, match="train.seed=1 has diverged"):
        report_study(study, records_of(study), tmp_path / "report")


def test_the_results_are_numbers_to_commit(written: StudyReport) -> None:
    text = (written.output / "study_results.json").read_text()
    results = json.loads(text)
    assert len(text) < 40_000
    assert str(written.study.folder) not in text.replace(results["commands"]["this page"], "")
    gate = [own["verdict"] for own in results["contrasts"] if own["outcome"] == "loss" and own["asked"] == "the gate"]
    assert gate == [own.verdict for own in written.comparisons[:2]]
    assert len(results["contrasts"]) == 2 * 2 * 4
    assert results["cells"][0]["outcomes"].keys() == {"loss", "gsm8k"}
    assert sum(results["cells"][0]["endings"]["gsm8k"].values()) == pytest.approx(1, abs=1e-5)
    assert results["versions"] == {"torch": "2.9.0"}
    assert results["machines"] == ["CPU, 2 threads, 1 process, Linux, Python 3.12.1"]
    assert results["commands"]["each cell alone"]["CeRA, r = 16"] == (
        "cera-train -m +study=gate study.arm=cera adapter.r=16 optimizer.lr=0.001 name=gate_by_hand"
    )
    assert results["verdicts"] == written.verdicts


def test_the_protocol_holds_what_is_shared_and_what_each_arm_changes(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    names, settings = report.arms
    assert names == ["CeRA", "LoRA"]
    assert settings == {"adapter.kind": ["cera", "lora"]}
    assert report.shared["train.batch_size"] == "64"
    assert not report.shared.keys() & {"adapter.kind", "adapter.r", "train.seed", "name"}
    assert report.cautions == []


def test_the_same_study_gives_the_same_page_byte_for_byte(written: StudyReport, tmp_path: Path) -> None:
    write_study(written.study, written.records, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (written.output / path.name).read_bytes(), path.name


def test_the_files_show_hostile_text_as_text_and_load_nothing(tmp_path: Path) -> None:
    gains = {("lora", 16): 0.0, ("a|<i>$x$", 16): 0.01}
    study = make_study(tmp_path / "gate", gains, question=HOSTILE, seeds=2, problems=20)
    write_study(study, records_of(study), tmp_path / "report")
    html, text = ((tmp_path / "report" / name).read_text() for name in ("report.html", "report.md"))
    assert "<script" not in html + text
    assert "<i>" not in html
    assert not re.search(r"https?://|url\((?!#)|@import|<link|<iframe", html)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        pipes = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(pipes) == 1, table
    for name in re.findall(r"!\[.*\]\(([^)]+\.png)\)", text):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_sound_in_a_browser(browser: Any, written: StudyReport, width: int, scheme: str) -> None:
    with sound_page(browser, written.output / "report.html", width, scheme) as (page, pictures):
        assert pictures == 6
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
        links = "[...document.querySelectorAll('nav a')].map(each => each.getAttribute('href').slice(1))"
        assert set(page.evaluate(links)) <= set(ids)


def test_the_printed_page_is_light_and_whole(browser: Any, written: StudyReport) -> None:
    page = browser.new_page(viewport={"width": 700, "height": 1000}, color_scheme="dark")
    page.goto((written.output / "report.html").as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 35, 40)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.evaluate("getComputedStyle(document.querySelector('.results tr')).display") == "table-row"
    assert page.evaluate("[...document.querySelectorAll('details dd')].every(each => each.checkVisibility())")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    page.close()

"""report.html, report.md, their pictures and the terminal: self-contained, safe, and sound in a
real browser at a telephone's width."""

import re
from html import unescape
from pathlib import Path

import pytest
from made_files import write_lines
from made_runs import HOSTILE, add_evaluation, make_run, two_runs

from cera_train.report.document import Picture
from cera_train.report.page import compare_runs

STEERING = "\x1b[31m\x9b\u202e\ud800"


def hostile_runs(folder: Path) -> list[Path]:
    runs = []
    for number, solved in enumerate(({0, 1}, {2})):
        settings = {"data.prompt": f"{HOSTILE}{STEERING}{number}", "adapter.r": 8 * (number + 1)}
        one_line = HOSTILE.replace("\n", " ")  # a name with a line break is refused
        run = make_run(folder / f"run{number}", name=f"{number}{one_line}", **settings)
        add_evaluation(run, "a|b<i>$x$ (1)", solved=solved)
        runs.append(run)
    return runs


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a dozen runs, one with a name without a place to break, one unfinished, two
    hostile."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [*two_runs(folder), *hostile_runs(folder / "hostile")]
    runs += [make_run(folder / f"cera_r{r}", 1.9, **{"adapter.r": r}) for r in (8, 16, 128, 256)]
    runs += [make_run(folder / ("n" * 70)), make_run(folder / "unfinished", finished=False)]
    compare_runs(runs).write(folder / "report")
    return folder / "report"


def test_the_page_loads_nothing_from_elsewhere(pages):
    html = (pages / "report.html").read_text()
    targets = re.findall(r"""(?:src|srcset|href|data|action|poster)\s*=\s*["']?([^"'>]*)""", html)
    assert len(targets) == 6
    assert all(target.startswith("data:image/png;base64,") for target in targets)
    html = html.replace(
        'xmlns="http://www.w3.org/2000/svg"', ""
    )  # a name, from which nothing loads
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", html)
    assert len(html) < 1_500_000


def test_pages_show_hostile_text_as_text(pages):
    html = (pages / "report.html").read_text()
    markdown = (pages / "report.md").read_text()
    assert "<script" not in html + markdown
    assert "<i>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7 * 7 }}" in html
    assert html.index("<svg") < html.index("<table")  # it opens with the verdicts
    assert "<code>cera-train +recipe=math_r64 name=cera_64</code>" in unescape(html)
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        pipes = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(pipes) == 1, table
    shown = re.findall(r"!\[.*\]\(([^)]+\.png)\)", markdown)
    assert len(shown) == len(list(pages.glob("*.png")))


@pytest.mark.slow
def test_the_page_is_sound_in_a_browser(browser, pages):
    """No error, no request, pictures with a text, unique ids, and no wider than the window."""
    path = pages / "report.html"
    page = browser.new_page(viewport={"width": 360, "height": 800})
    problems = []
    requests = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    pictures = page.evaluate("""[...document.querySelectorAll('figure img')].map(picture => [
        picture.getBoundingClientRect().width, picture.naturalWidth, picture.alt.length])""")
    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert all(width > 250 and pixels == 810 and alt > 20 for width, pixels, alt in pictures)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(set(ids)) == len(ids)
    assert len(pictures) == 6
    texts = page.evaluate("""[...document.querySelectorAll('svg.forest text')].map(text => {
        const box = text.getBBox(); return [box.x, box.x + box.width]})""")
    assert len(texts) > 20
    assert all(left > 10 and right < 478 for left, right in texts)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()


def test_the_terminal_shows_table_tests_and_notes_as_plain_text(tmp_path, capsys):
    runs = [*two_runs(tmp_path), make_run(tmp_path / "unfinished", finished=False)]
    compare_runs(runs).print(tmp_path / "report")
    shown = capsys.readouterr().out
    for part in ("27,262,976", "not shown (detects 31.9)", "unfinished at update 50"):
        assert part in shown
    assert f"report      {tmp_path}/report/report.html" in shown
    assert (
        max(
            len(line)
            for line in shown.splitlines()
            if line[:3] != "  -" and str(tmp_path) not in line
        )
        <= 100
    )
    assert "\x1b" not in shown


def pictures_of(*runs: Path) -> dict[str, Picture]:
    page = compare_runs(runs)
    return {picture.name: picture for picture in [*page.pictures, *page.spectra]}


def test_rewards_and_the_length_of_answers_are_drawn_by_update(tmp_path):
    run = make_run(tmp_path / "a")
    lines = [
        {
            "update": update,
            "train/reward": update / 4,
            "train/completions/mean_length": 9 - update,
        }
        for update in (1, 2)
    ]
    write_lines(run / "metrics.jsonl", lines)
    pictures = pictures_of(run)
    assert pictures["reward-by-update"].alt == "Reward by update. a: 0.25 to 0.5."
    assert pictures["length-of-answers-by-update"].alt == "Length of answers by update. a: 8 to 7."
    assert "margin-by-update" not in pictures


def test_runs_on_other_rows_or_that_diverged_are_not_drawn_beside_the_rest(tmp_path):
    runs = [make_run(tmp_path / f"r{r}", 1 + 1 / r, **{"adapter.r": r}) for r in (64, 128)]
    runs.append(make_run(tmp_path / "c", 1.5, **{"adapter.kind": "lora"}))
    runs.append(make_run(tmp_path / "d", held_out="others", **{"adapter.r": 8}))
    runs.append(make_run(tmp_path / "e", perplexity=float("inf"), **{"adapter.r": 16}))
    picture = pictures_of(*runs)["perplexity-by-rank"]
    assert picture.alt == "Perplexity by rank. CeRA: 1.016 to 1.008; LoRA: 1.5 to 1.5."


def test_the_page_opens_with_the_verdict_of_each_pair(tmp_path):
    """In points; a run that solves more is on the side of the better."""
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, solved in zip(runs, (10, 12, 35), strict=True):
        add_evaluation(run, "gsm8k", solved=set(range(solved)))
    page = compare_runs(runs)
    [group] = page.verdicts.groups
    assert (group.heading, group.note) == ("gsm8k", "verified, 40 problems")
    rows = {row.label: row for row in group.rows}
    assert {label: row.mark for label, row in rows.items()} == {
        "b - a": "not shown",
        "c - a": "better",
        "c - b": "better",
    }
    assert rows["c - a"].difference == pytest.approx(-62.5)
    assert rows["c - a"].lower < -62.5 < rows["c - a"].upper < 0
    assert rows["b - a"].verdict == f"not shown (detects {rows['b - a'].detectable:.1f})"

"""report.html and report.md: self-contained, safe, and sound in a real browser at the width of a telephone."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from made_runs import HOSTILE, add_evaluation, make_run, two_runs

from cera_train.common.trust import clean
from cera_train.report.page import write_report

STEERING = "\x1b[31m\x9b\u202e\ud800"


def hostile_runs(folder: Path) -> list[Path]:
    runs = []
    for number, solved in enumerate(({0, 1}, {2})):
        settings = {"data.prompt": f"{HOSTILE}{STEERING}{number}", "adapter.r": 8 * (number + 1)}
        run = make_run(folder / f"run{number}", name=f"{number}{HOSTILE}{STEERING}", **settings)
        task = "a|b<i>$x$ (1)"
        add_evaluation(run, task, solved=solved)
        runs.append(run)
    return runs


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_report(two_runs(tmp_path), tmp_path / "report")
    html = (tmp_path / "report/report.html").read_text()
    targets = re.findall(r"""(?:src|srcset|href|data|action|poster)\s*=\s*["']?([^"'>]*)""", html)
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"https?://|url\((?!#)|@import|<script|<link|<iframe", html)
    assert html.count("<svg") == 7
    assert len(html) < 1_500_000


def test_the_page_shows_hostile_text_as_text(tmp_path: Path) -> None:
    report = write_report(hostile_runs(tmp_path), tmp_path / "report")
    html = (tmp_path / "report/report.html").read_text()
    assert "<script" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7 * 7 }}" in html
    assert clean(report.trained[0].files.environment.command_line) in unescape(html)


def test_the_markdown_keeps_its_tables_and_shows_hostile_text_as_text(tmp_path: Path) -> None:
    write_report(hostile_runs(tmp_path), tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        pipes = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(pipes) == 1, table
    shown = re.findall(r"!\[.*\]\(([^)]+\.png)\)", text)
    assert shown
    assert "accuracy-a%7Cb%3Ci%3E%24x%24%20%281%29.png" in shown


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a dozen runs, one with a name without a place to break, one unfinished, one hostile."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [*two_runs(folder), *hostile_runs(folder / "hostile")]
    runs += [make_run(folder / f"cera_r{r}", 1.9, **{"adapter.r": r}) for r in (8, 16, 128, 256)]
    runs += [make_run(folder / ("n" * 70)), make_run(folder / "unfinished", finished=False)]
    write_report(runs, folder / "report")
    return folder / "report" / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_sound_in_a_browser(browser: Any, page_path: Path, width: int, scheme: str) -> None:
    """No error, no request, pictures that follow the colours of the page, unique ids, and no wider than the window."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    pictures = page.evaluate("""[...document.querySelectorAll('figure svg')].map(svg => [
        svg.getBoundingClientRect().width, svg.querySelectorAll('path, text').length, svg.ariaLabel.length,
        getComputedStyle(svg.querySelector('text')).fill, getComputedStyle(document.body).color,
        getComputedStyle(svg.querySelector('path')).fill])""")
    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [page_path.as_uri()]
    assert all(width > 250 and marks > 20 and alt > 20 for width, marks, alt, *_ in pictures)
    assert {(text, background) for *_, text, _, background in pictures} == {
        ("rgb(31, 35, 40)", "rgb(255, 255, 255)") if scheme == "light" else ("rgb(230, 233, 238)", "rgb(22, 27, 34)")
    }  # a picture follows the page
    assert all(text == page_text for *_, text, page_text, _ in pictures)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(set(ids)) == len(ids)
    assert len(pictures) >= 7
    nothing = "[...document.querySelectorAll('.results td > .nothing:only-child')]"
    is_shown = page.evaluate(f"{nothing}.map(value => value.offsetParent !== null)")
    assert set(is_shown) == {width > 360}  # a card on a telephone has only what was measured
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()

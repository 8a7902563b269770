"""A report of a run whose files hold anything: it is made, or the file is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import add_evaluation, make_run
from strategies import changed, fuzz, mutated

from cera_train.report.page import compare_runs, page_template

FILES = ["config.yaml", "result.json", "metrics.jsonl", "spectrum.json", "environment.json"]
FILES_OF_AN_EVALUATION = ["config.yaml", "result.json", "problems.jsonl", "grades.jsonl"]
EVERY_FILE = [*FILES, *(f"eval/gsm8k/{name}" for name in FILES_OF_AN_EVALUATION)]

TEMPLATES = [page_template(name) for name in ("report.md", "report.html")]
for page in TEMPLATES:
    page.environment.filters["svg"] = lambda picture: ("0 0 1 1", "")  # drawing takes a second


@pytest.fixture(scope="module")
def two_small_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name, **{"adapter.r": r}) for name, r in (("a", 4), ("b", 8))]
    for run, solved in zip(runs, ({0}, {1}), strict=True):
        add_evaluation(run, "gsm8k", solved=solved, problems=2)
        add_evaluation(run, "forgetting", solved=solved, problems=2)
    return runs


def lines_of(path: Path) -> list:
    text = path.read_text()
    if path.suffix == ".yaml":
        return [yaml.safe_load(text)]
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", EVERY_FILE)
@settings(fuzz, max_examples=40)
@given(data=st.data())
def test_a_report_is_made_or_the_broken_file_is_named(
    two_small_runs: list[Path], name: str, data: st.DataObject
) -> None:
    path = two_small_runs[0] / name
    valid = path.read_bytes()
    first, *others = lines_of(path)
    lines = [data.draw(changed(first)), *others]
    broken = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(data.draw(st.just(broken) | mutated(broken)))
    reason, report = "", None
    try:
        report = compare_runs(two_small_runs)
    except ValueError as error:
        reason = str(error)
    finally:
        path.write_bytes(valid)
    if report is None:
        assert str(two_small_runs[0]) in reason
        return
    for page in TEMPLATES:
        page.render(report=report).encode()

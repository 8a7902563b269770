"""Arms that another program ran: a study copies their scores by seed and judges them as its own."""

import json
from pathlib import Path

import numpy as np
import pytest

from cera_train.common.errors import UserError
from cera_train.runs.results import read_grades
from cera_train.settings.sweep import StudyConfig
from cera_train.study.folder import find_study
from cera_train.study.imported import import_run
from cera_train.study.results import contrasts_of


@pytest.fixture
def training(write_jsonl) -> dict:
    """Runs that answer a task."""
    rows = [{"question": f"What is {number} + 1?", "answer": "#### 1"} for number in range(3)]
    questions = write_jsonl("questions.jsonl", rows)
    settings = {"gsm8k": {"files": [str(questions)]}}
    return {"train": {"max_updates": 100, "tasks": ["gsm8k"], "task_settings": settings}}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """The scores of three seeds on 80 problems: 60 and a few are right, others in each seed."""
    for seed in range(3):
        path = tmp_path / "theirs" / str(seed) / "gsm8k.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(
            "".join(
                json.dumps({"problem": f"p{number}", "score": (number + seed) % 80 < 60 + seed})
                + "\n"
                for number in range(80)
            )
        )
    return tmp_path / "theirs"


@pytest.fixture
def section(theirs: Path) -> dict:
    """Ours, tuned, and theirs."""
    arms = {"lora": ["adapter=lora"], "theirs": [f"study.results={theirs}"]}
    return {
        "arms": arms,
        "contrasts": {},
        "outcomes": ["gsm8k"],
        "seeds": 3,
        "equal": "none",
    }


def test_an_arm_of_another_program_is_judged_by_a_studys_statistics(
    launcher, run_study, section, training, capfd, run_command
):
    launcher.scores = 0.3
    assert run_study(study=section, **training) == 0
    assert launcher.began == [
        f"adapter.r=4,optimizer.lr={lr},study.arm=lora,train.seed={seed}"
        for lr in (0.001, 0.01)
        for seed in range(3)
    ]
    study = find_study(launcher.sweep)
    assert not study.missing()
    ours, theirs = study.cells
    assert (ours.arm, theirs.arm, theirs.condition, theirs.chosen.values) == (
        "lora",
        "theirs",
        "",
        {},
    )
    assert theirs.means("gsm8k") == [60 / 80, 61 / 80, 62 / 80]
    [[contrast]] = contrasts_of(study)
    differences = np.subtract(theirs.means("gsm8k"), ours.means("gsm8k"))
    assert contrast.by_seed == pytest.approx(differences.tolist())
    assert (contrast.seeds, contrast.problems) == (3, 80)
    assert run_command("cera-report", str(launcher.sweep)) == 0
    assert "theirs - lora" in capfd.readouterr().out

    [grades] = launcher.sweep.glob("study.arm=theirs,train.seed=1/grades/gsm8k.jsonl")
    grades.write_text(grades.read_text().replace("p79", "q79"))
    with pytest.raises(UserError, match="had different problems of gsm8k, and cannot be compared"):
        contrasts_of(find_study(launcher.sweep))


def test_an_arm_of_another_program_has_no_tuned_setting_that_a_plus_adds(
    launcher, run_study, section, training
):
    launcher.scores = 0.3
    launcher.loss = lambda values: 1.0
    tune = {"++adapter.settings.own": [1, 2]}
    assert run_study(study=section | {"tune": tune, "conditions": {}}, **training) == 0
    _, theirs = find_study(launcher.sweep).cells
    assert theirs.obstacles == []


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "study.results={}/theirs has no folder 5 with the results of that seed"),
        ('{"problem": 1}', "{}/theirs/5 holds no results that cera-report reads"),
        ('{"problem": 1, "score": 7}', "gsm8k.jsonl:1: score 7.0: expected a number from 0 to 1"),
        (
            '{"problem": 1, "score": 1}',
            "{}/theirs/5 has no scores on math of study.outcomes",
        ),
    ],
)
def test_results_that_cannot_stand_for_an_arm_are_refused(
    theirs: Path, tmp_path: Path, content: str, line: str
):
    if content:
        (theirs / "5").mkdir()
        (theirs / "5" / "gsm8k.jsonl").write_text(content)
    overrides = ["study.arm=theirs", f"study.results={theirs}", "train.seed=5"]
    with pytest.raises(UserError, match=line.format(tmp_path)):
        import_run(tmp_path / "job", overrides, ["math"])
    assert not (tmp_path / "job" / "result.json").exists()


def test_an_imported_run_stays_when_its_source_changes(theirs: Path, tmp_path: Path):
    overrides = ["study.arm=theirs", f"study.results={theirs}", "train.seed=0"]
    import_run(tmp_path / "job", overrides, ["gsm8k"])
    before = read_grades(tmp_path / "job", "gsm8k")
    (theirs / "0" / "gsm8k.jsonl").unlink()
    import_run(tmp_path / "job", overrides, ["gsm8k"])
    assert read_grades(tmp_path / "job", "gsm8k") == before
    assert len(before) == 80

    overrides[1] = "study.results=others"
    with pytest.raises(UserError, match=f"job holds what study.results={theirs} had: .* remove"):
        import_run(tmp_path / "job", overrides, ["gsm8k"])


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"outcomes": ["loss"]}, "has no losses of held-out rows and no bases"),
        ({"arms": {"theirs": ["study.results=x", "adapter.r=4"]}}, "leave its other settings out"),
    ],
)
def test_an_arm_that_is_not_trained_has_no_settings_and_no_loss(section: dict, line: str):
    study = {"baseline": "lora", "tune": {"optimizer.lr": [1e-3]}, "outcomes": ["gsm8k"]} | section
    study["arms"] = {"lora": [], "theirs": ["study.results=x"]} | section.get("arms", {})
    with pytest.raises(UserError, match=line):
        StudyConfig(**study)

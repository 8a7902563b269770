"""Folders that the installed lm-eval makes of two tiny models are compared by `cera-report`."""

import json

import pytest
from commands import python
from conftest import make_tiny_llama
from made_files import write_lines

from cera_train.common.files import read_json
from cera_train.report.comparison import paired_tests
from cera_train.report.readers import read_runs

PROBLEMS = 30

CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "What is {{{{left}}}} + 1? Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
num_fewshot: {shots}
fewshot_split: test
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
ANSWER = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "What is {{{{left}}}} + 1? Answer:"
doc_to_target: "{{{{choices[right]}}}}"
num_fewshot: 0
generation_kwargs: {{until: ["Q"], max_gen_toks: 48, do_sample: false}}
metric_list: [{{metric: exact_match}}]
filter_list:
- name: strict
  filter: [{{function: regex, regex_pattern: "= (\\\\d+)"}}, {{function: take_first}}]
- name: flexible
  filter: [{{function: regex, regex_pattern: "(\\\\d)"}}, {{function: take_first}}]
metadata: {{version: 1.0}}
"""


EVALUATE = """
import json, sys
from lm_eval.__main__ import cli_evaluate
for sys.argv[1:] in json.loads(sys.argv[1]):
    cli_evaluate()
"""
"""Several commands in one process: importing lm-eval takes longest."""


@pytest.fixture
def folders(tmp_path, tokenizer):
    """What lm-eval leaves of two models, and of the second with two shots."""
    problems = [
        {"left": number, "choices": [str(number + 1), str(number + 2)], "right": number % 2}
        for number in range(PROBLEMS)
    ]
    rows = write_lines(tmp_path / "rows.jsonl", problems)
    for shots in (0, 2):
        tasks = tmp_path / f"tasks{shots}"
        tasks.mkdir()
        (tasks / "sums.yaml").write_text(CHOICE.format(rows=rows, shots=shots))
        (tasks / "written.yaml").write_text(ANSWER.format(rows=rows))
    for name in ("first", "second"):
        tiny = make_tiny_llama(len(tokenizer), tie_word_embeddings=name == "second")
        tiny.save_pretrained(tmp_path / f"model_{name}")
        tokenizer.save_pretrained(tmp_path / f"model_{name}")

    made = {"first": ("first", 0), "second": ("second", 0), "other_shots": ("second", 2)}
    commands = [
        f"--model hf --model_args pretrained={tmp_path}/model_{model},dtype=float32 --device cpu "
        f"--batch_size 8 --tasks sums,written --include_path {tmp_path}/tasks{shots} "
        f"--output_path {tmp_path}/{name} --log_samples".split()
        for name, (model, shots) in made.items()
    ]
    python("-c", EVALUATE, json.dumps(commands))
    return [tmp_path / name for name in made]


@pytest.mark.slow
def test_folders_of_lm_eval_are_compared_with_its_own_accuracies(folders):
    """The means are those that lm-eval reports, and other shots are refused."""
    runs = read_runs(folders)
    assert [run.name for run in runs] == ["first", "second", "other_shots"]
    for run, folder in zip(runs, folders, strict=True):
        [path] = folder.glob("*/results_*.json")
        results = read_json(path)["results"]
        figures = {
            (task, metric.label): figure.value
            for task, evaluation in run.evaluations.items()
            for metric, figure in evaluation.figures.items()
        }
        assert figures == pytest.approx(
            {
                ("sums acc", "none"): results["sums"]["acc,none"],
                ("sums acc_norm", "none"): results["sums"]["acc_norm,none"],
                ("written exact_match", "strict"): results["written"]["exact_match,strict"],
                ("written exact_match", "flexible"): results["written"]["exact_match,flexible"],
            }
        )
    tests, notes = paired_tests(runs)
    pairs = [(test.task, test.first, test.second, test.problems) for test in tests]
    assert pairs.count(("sums acc", "first", "second", PROBLEMS)) == 1
    assert pairs.count(("written exact_match", "second", "other_shots", PROBLEMS)) == 1
    assert "sums acc, first and other_shots: shots differ: 0 and 2: evaluate both alike." in notes

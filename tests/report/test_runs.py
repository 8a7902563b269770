"""The table's figures against the files they come from, which runs it has, and what is missing."""

from made_files import change_json, write_json
from made_runs import add_evaluation, cells, make_run, two_runs

from cera_train.common.files import read_json
from cera_train.report.page import compare_runs
from cera_train.report.readers import read_runs
from cera_train.runs.results import DIVERGED


def test_every_column_has_the_figures_of_the_files(tmp_path):
    # As 0.2.0 recorded it.
    unmeasured = make_run(tmp_path / "c", published={"math/exact/pass@1": 0.1636})
    table = cells(*two_runs(tmp_path), unmeasured)
    assert table["method"] == ["CeRA", "LoRA", "CeRA"]
    assert table["r"] == ["64", "512", "64"]
    assert table["parameters"][0] == "27,262,976\n0.34% of the model"
    assert table["perplexity"][:2] == [
        "1.850\nbest 1.750 at update 80",
        "2.020\nbest 1.920 at update 80",
    ]
    assert table["effective rank"] == ["25.6", "204.8", "25.6"]
    assert table["tokens/s"][0] == "1,234"
    assert table["peak memory"][0] == "5.4 GB"
    assert table["time"][0] == "1:02:05\n100 updates"
    result = read_json(tmp_path / "lora_512/eval/math/result.json")
    lower, upper = result["exact/pass@1/interval"]
    assert table["math exact"][1] == f"47.5%\n{100 * lower:.1f} to {upper:.1%}"
    assert table["math exact"][2] == ""


def test_logistic_map_and_forgetting_have_columns_of_their_own(tmp_path):
    run = make_run(tmp_path / "a")
    path = add_evaluation(run, "logistic_map", solved={0}, verified=False) / "result.json"
    change_json(path, {"step_accuracy/mean": 0.625, "state_collapse": 0.25})
    forgetting = run / "eval/forgetting"
    forgetting.mkdir()
    (forgetting / "config.yaml").write_text(
        "task: {kind: perplexity, name: forgetting, window: 1024}\n"
    )
    result = {
        "task": "forgetting",
        "kind": "perplexity",
        "perplexity": 12.345,
        "perplexity_base": 12.0,
    }
    write_json(forgetting / "result.json", result)
    table = cells(run)
    assert table["logistic_map step accuracy"] == ["62.5%"]
    assert table["logistic_map state collapse"] == ["25.0%"]
    assert "logistic_map verified" not in table
    assert table["forgetting perplexity"] == ["12.345"]
    assert table["forgetting perplexity without adapter"] == ["12.000"]


def test_variants_of_a_method_are_told_apart(tmp_path):
    relu = make_run(tmp_path / "a", **{"adapter.activation": "relu"})
    scaled = make_run(
        tmp_path / "b", **{"adapter.kind": "lora", "adapter.alpha": 32, "adapter.r": 512}
    )
    matched = make_run(
        tmp_path / "c", **{"adapter.kind": "lora", "adapter.alpha": 512, "adapter.r": 512}
    )
    mixed = make_run(tmp_path / "d", **{"adapter.mix": "learned"})
    methods = ["CeRA (relu)", "LoRA (alpha 32)", "LoRA", "CeRA (learned mix)"]
    assert cells(relu, scaled, matched, mixed)["method"] == methods


def test_the_runs_of_a_folder_come_once_and_by_name(tmp_path):
    names = sorted(
        f"adapter.r={r},optimizer.lr={lr}" for r in (64, 512) for lr in ("1e-05", "0.0005", "0.01")
    )
    for name in reversed(names):
        make_run(tmp_path / name)
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / ".jobs").mkdir()
    assert [run.name for run in read_runs([tmp_path, tmp_path / names[1]])] == names


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    first = make_run(tmp_path / "x" / "run")
    second = make_run(tmp_path / "y" / "run")
    assert [run.name for run in read_runs([first, second])] == [str(first), str(second)]


def test_the_base_model_and_an_adapter_take_part_with_their_evaluations(tmp_path):
    """By name: what an adapter from elsewhere is, its evaluation does not know."""
    add_evaluation(tmp_path / "base-Llama", "math", solved={1, 2}, adapter_digest=None)
    add_evaluation(tmp_path / "lora", "math", solved={1, 2, 3})
    table = cells(tmp_path)
    assert table["run"] == ["base-Llama", "lora"]
    assert table["method"] == ["untouched base", ""]
    assert table["math exact"][1].startswith("7.5%")
    assert len(compare_runs([tmp_path]).tables[1].rows) == 1


def test_an_unfinished_run_shows_what_it_has_and_is_named(tmp_path):
    run = make_run(tmp_path / "a", perplexity=2.0, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 60, "train/lo')  # the line a killed process was writing
    table = cells(run)
    assert table["perplexity"] == ["2.960\nunfinished at update 50"]
    assert table["effective rank"] == ["10.2"]
    assert table["time"] == ["5:00"]
    assert "parameters" not in table
    (run / DIVERGED).write_text("the loss of update 51 is not finite")
    assert cells(run)["perplexity"] == ["2.960\ndiverged at update 50"]


def test_a_perplexity_that_is_not_finite_is_shown(tmp_path):
    first, second = two_runs(tmp_path)
    change_json(first / "result.json", {"eval/perplexity": None})
    assert cells(first, second)["perplexity"][0].startswith("inf")

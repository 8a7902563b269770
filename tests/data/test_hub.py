"""Data sets of the Hub and of folders: what reaches the library, and the one line that a mistake gets."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from cera_train.common.errors import UserError
from cera_train.data import hub
from cera_train.data.sources import check_data, from_hub, open_sources
from cera_train.settings.data import DataConfig

ROWS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(4)]


@pytest.fixture
def refusal(tmp_path, monkeypatch, write_jsonl):
    """refusal(path, **settings) -> the line that a data set is refused with: `ds` has four rows, `two` has subsets"""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("ds", "two", "empty", "broken"):
        (tmp_path / name).mkdir()
    write_jsonl("ds/train.jsonl", ROWS)
    write_jsonl("two/t.jsonl", ROWS)
    subsets = "".join(f"- config_name: {name}\n  data_files: t.jsonl\n" for name in ("alpha", "beta"))
    (tmp_path / "two" / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    (tmp_path / "broken" / "train.jsonl").write_text('{"a": \n')

    def refusal(path: str, **settings) -> str:
        config = DataConfig(path=path, prompt="{prompt}", completion="{completion}", **settings)
        with pytest.raises(UserError) as error:
            open_sources(config)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refusal


@pytest.mark.parametrize(
    ("path", "settings", "line"),
    [
        ("./none", {}, "data.path=./none: folder does not exist (from "),
        ("/none", {}, "data.path=/none: folder does not exist (from "),
        ("~/x", {}, "data.path=~/x: folder does not exist (from "),
        ("a/b/c", {}, "data.path=a/b/c: folder does not exist (from "),
        ("a b", {}, "data.path=a b: folder does not exist (from "),
        ("x" * 300, {}, f"data.path={'x' * 300}: cannot read it: File name too long."),
        ("ds/train.jsonl", {}, "data.path=ds/train.jsonl: it is a file: set data.train_files and data.eval_files to l"),
        ("empty", {}, "data.path=empty: cannot load data set 'empty' from this folder ("),
        ("broken", {}, "data.path=broken: cannot load data set 'broken' from this folder (Expected object or value"),
        ("ds", {}, "data.eval_split=test: data set ds has no such split: set it to one of train."),
        ("ds", {"train_split": "x"}, "data.train_split=x: data set ds has no such split: set it to one of train."),
        ("ds", {"train_split": "train[:x]"}, "data.train_split=train[:x]: not a split (Unrecognized instruction form"),
        ("ds", {"train_split": "train[9:]"}, "data.train_split=train[9:]: data set ds has no such rows: take others"),
        ("ds", {"train_split": ""}, "data.train_split=: not a split ("),
        ("ds", {"subset": "x"}, "data.subset=x: data set ds has no such subset: set it to one of default, or null."),
        ("two", {}, "data.path=two: the data set has subsets: set data.subset to one of alpha, beta"),
        ("some/set", {}, "data.path=some/set: cannot load data set 'some/set' from the Hub (HF_HUB_OFFLINE=1 is set"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_names_the_setting_at_fault(refusal, path, settings, line):
    assert refusal(path, **settings).startswith(line)


def test_a_tasks_data_set_is_refused_by_the_tasks_keys(refusal):
    with pytest.raises(UserError, match=r"^task\.split=x: data set ds has no such split: set it to one of train\.$"):
        from_hub("ds", None, None, "x")
    with pytest.raises(UserError, match=r"^task\.path=ds/train.jsonl: it is a file: set task\.files to local files"):
        from_hub("ds/train.jsonl", None, None, "x")


def test_without_a_network_a_data_set_is_refused_at_once(refusal, no_network, monkeypatch, caplog):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert refusal("some/set") == (
        "data.path=some/set: cannot load data set 'some/set' from the Hub (http://127.0.0.1:9 does not answer, and the "
        "cache does not hold it). Where there is a network, log in with `hf auth login` if it is gated; without one, "
        "set data.train_files and data.eval_files to local files."
    )
    assert caplog.records == []
    assert not datasets.config.HF_HUB_OFFLINE


def test_libraries_log_again_after_loading():
    before = logging.getLogger("datasets").level
    with hub.hub_or_cache(needs_hub=False):
        assert logging.getLogger("datasets").level == logging.CRITICAL
    assert logging.getLogger("datasets").level == before


# --- the quick look --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"prompt": "{q}", "completion": "{completion}"},
            ":1: column 'q' (named in data.prompt) is missing; its colum",
        ),
        (
            {"layout": "messages"},
            ":1: column 'messages' is missing (data.layout=messages); its columns are prompt, com",
        ),
        ({"layout": "conversations"}, ":1: column 'conversations' is missing (data.layout=conversations); its columns"),
    ],
)
def test_the_first_rows_are_looked_at_without_a_model(write_jsonl, settings, line):
    path = write_jsonl("x.jsonl", ROWS)
    with pytest.raises(UserError) as error:
        check_data(DataConfig(train_files=[str(path)], eval_rows=1, **settings))
    assert str(error.value).startswith(f"{path}{line}")


def test_the_quick_look_finds_a_missing_evaluation_file_and_passes_good_rows(write_jsonl):
    path = str(write_jsonl("x.jsonl", ROWS))
    good = DataConfig(train_files=[path], eval_files=[path], prompt="{prompt}", completion="{completion}")
    check_data(good)
    check_data(DataConfig(path="some/set", layout="conversations"))  # the Hub is not asked
    good.eval_files = ["no.jsonl"]
    with pytest.raises(UserError, match=r"^data\.eval_files=no\.jsonl: cannot read the file"):
        check_data(good)


def test_the_quick_look_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'}"
    program = "import sys; sys.argv[0] = 'cera-train'\n"
    program += f"import cera_train.data.sources; print(sorted({heavy}.intersection(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"

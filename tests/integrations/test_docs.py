"""README.md, docs/, CONTRIBUTING.md and recipes/README.md hold: their commands compose, their Python runs, what they
name exists."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import needs_smollm2
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from page_blocks import blocks

from cera_train.cli.mistakes import SCHEMAS
from cera_train.common.files import config_dir

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *DOCS]
TASKS = {  # the pages that the README promises, by task
    *("train", "data", "sweep", "evaluate", "compare", "plan", "cluster", "python", "reliability", "performance"),
    *("computes", "architectures", "evidence", "studies", "statistics", "serving"),
}
OF_FOLDERS = {"cera-report", "cera-sweep"}
"""Commands that take folders, not settings."""
NOT_RUN = "<!-- not run by the tests"
MADE_BY_COMMANDS = ("outputs/", "report/")
"""Folders that the pages' commands create."""


# --- what a page holds -----------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page), flags=re.DOTALL)
    return [" ".join(span.replace("\\|", "|").split()) for span in spans]


PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]


# --- commands --------------------------------------------------------------------------------------------------------


def words_of(line: str) -> list[str]:
    """The words of a line as bash splits it; comments are left out."""

    def unescape(quoted: re.Match) -> str:
        return shlex.quote(ast.literal_eval(f"'''{quoted[1]}'''"))

    return shlex.split(re.sub(r"\$'([^']*)'", unescape, line), comments=True)


def cut(words: list[str]) -> tuple[str, list[str]] | None:
    """A command of ours among these words, and its arguments. A launcher may stand before it."""
    for number, word in enumerate(words):
        if word.startswith("cera-") and word in (*SCHEMAS, *OF_FOLDERS):
            rest = words[number + 1 :]
        elif word == "cera_train" and words[number - 1] == "-m":
            word, rest = "cera-train", words[number + 1 :]
        else:
            continue
        end = next((at for at, other in enumerate(rest) if other in (";", "&&", "|") or other.endswith(";")), None)
        return word, [*rest[:end], *([rest[end].rstrip(";")] if end is not None and rest[end] != ";" else [])]
    return None


def commands_of(page: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Every command of ours: where it stands, its name, its arguments."""
    for block in blocks(page):
        if block.language in ("python", "json"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"(cera-\w+|torchrun|accelerate|srun|for) ", line) and (found := cut(words_of(line))):
                yield str(block), *found
    for span in inline_code(page):
        if re.match(r"cera-\w+ \S", span) and (found := cut(words_of(span))):
            yield page.name, *found


COMMANDS = [command for page in PAGES for command in commands_of(page)]
CHECKED = list({(name, *arguments): (place, name, arguments) for place, name, arguments in COMMANDS}.values())


def values_of(override: Override) -> list[str]:
    """The override with each value of its sweep; with the first of a range that a sweeper draws from."""
    if not override.is_sweep_override():
        return [override.input_line]
    values = override.value()
    drawn = [values.start] if isinstance(values, IntervalSweep) else override.sweep_string_iterator()
    return [f"{override.get_key_element()}={value}" for value in drawn]


def jobs_of(arguments: list[str]) -> list[list[str]]:
    """Jobs of a sweep that together have every value of these arguments. tests/sweep composes those of conf/sweep."""
    dimensions = [values_of(override) for override in OverridesParser.create().parse_overrides(arguments)]
    return [
        [values[number % len(values)] for values in dimensions]
        for number in range(max(map(len, dimensions), default=1))
    ]


def overrides_of(arguments: list[str]) -> tuple[list[str], bool]:
    """The overrides among these arguments, without flags and without Hydra's section; and whether they are a sweep."""
    settings = []
    words = iter(arguments)
    for word in words:
        if word in ("--cfg", "--config-dir"):
            next(words)
        elif not word.startswith("-"):
            settings.append(word)
    for launcher in (word.partition("=")[2] for word in settings if word.startswith("hydra/launcher=")):
        known = {path.stem for path in (config_dir("conf") / "hydra" / "launcher").glob("*.yaml")}
        assert launcher in known | {"submitit_slurm", "submitit_local"}
    return [word for word in settings if not word.lstrip("+").startswith("hydra")], "-m" in arguments


def test_the_pages_hold_commands():
    assert len(COMMANDS) >= 60
    assert {name for _, name, _ in COMMANDS} == {*SCHEMAS, *OF_FOLDERS}


@pytest.mark.parametrize(("place", "name", "arguments"), CHECKED, ids=[f"{place} {name}" for place, name, _ in CHECKED])
def test_every_command_composes_to_a_checked_config(compose, place, name, arguments):
    if name not in SCHEMAS or {"--help", "-sc"} & {*arguments}:
        return
    overrides, is_sweep = overrides_of(arguments)
    for job in jobs_of(overrides) if is_sweep else [overrides]:
        if any(word.startswith("run=") for word in job) and name == "cera-plan":
            assert [word.partition("=")[0] for word in job] == ["run"]
            continue
        assert compose(*job, command=name.removeprefix("cera-")) is not None


# --- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(compose, tmp_path_factory) -> Path:
    """A folder in which the quickstart has run, cut to two updates."""
    from cera_train.training.train import train

    folder = tmp_path_factory.mktemp("docs")
    changes = ("train.max_updates=2", "train.eval_every=null", f"output_dir={folder / 'outputs'}")
    train(compose("+recipe=quickstart", *changes))
    shutil.copytree(folder / "outputs" / "quickstart", folder / "outputs" / "by_token")  # a run of docs/train.md
    return folder


@pytest.mark.slow
@needs_smollm2
@pytest.mark.filterwarnings("default")  # of TRL and transformers: the blocks are a user's program
@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}), ids=lambda page: page.name)
def test_every_python_block_runs(quickstart, monkeypatch, capsys, page):
    """The blocks of a page run one after the other, as a reader would type them."""
    monkeypatch.chdir(quickstart)
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in PYTHON:
        if block.page == page and not block.comment.startswith(NOT_RUN):
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_every_python_block_imports_what_exists(block):
    """Also those that are not run, and where the real model is not installed."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("cera_train"):
            module = __import__(node.module, fromlist=["_"])
            assert all(hasattr(module, alias.name) for alias in node.names)


# --- names -----------------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors_of(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    """Paths from the top of the project, and tasks/gsm8k.py for one of cera_train/."""
    tops = {path.name for folder in (ROOT, ROOT / "cera_train") for path in folder.iterdir() if path.is_dir()}
    for span in inline_code(page):
        path = span.rstrip("/")
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", span) or re.fullmatch(r"[\w-]+\.(py|toml)|[\w-]+/", span)
        if not is_path or span.startswith(MADE_BY_COMMANDS) or path.split("/")[0] not in tops or "NAME" in span:
            continue
        assert (ROOT / path).exists() or (ROOT / "cera_train" / path).exists(), span


# --- shape -----------------------------------------------------------------------------------------------------------


def test_the_readme_fits_on_150_lines_and_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert {page.stem for page in DOCS} == TASKS | {"tutorial"}
    assert all(f"(docs/{name}.md)" in text for name in TASKS)


def test_the_tree_of_the_readme_is_the_tree():
    tree = next(block.text for block in blocks(ROOT / "README.md") if block.text.startswith("cera_train/"))
    named = {*re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE)}
    assert named == {path.parent.name for path in (ROOT / "cera_train").glob("*/__init__.py")}
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE))

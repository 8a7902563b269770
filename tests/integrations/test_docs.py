"""README.md, docs/, CONTRIBUTING.md and recipes/README.md are correct: their commands compose,
their Python runs, what they name exists. The tutorial and the notebook print what they show. `make
docs` builds."""

import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from commands import python
from conftest import needs_smollm2
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from made_files import write_lines
from own_imports import failing_imports

from cera_train.cli.mistakes import SCHEMAS
from cera_train.common.files import config_dir

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *DOCS]
PAGES.append(ROOT / "docs" / "evidence" / "archive.md")
API = sorted((ROOT / "docs" / "api").glob("*.md"))
PAGES += API
OF_FOLDERS = {"cera-report", "cera-sweep"}
"""Commands that take folders, not settings."""
MADE_BY_COMMANDS = ("outputs/", "report/")
"""Folders that the pages' commands create."""


# --- what a page holds ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block, or an indented one, which has no language."""

    page: Path
    line: int
    language: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        start = number
        if fence := re.fullmatch(r"```(\w*)", lines[number]):
            number = lines.index("```", number + 1)
            yield Block(page, start + 1, fence[1], "\n".join(lines[start + 1 : number]))
        elif lines[number].startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while number + 1 < len(lines) and lines[number + 1].startswith("    "):
                number += 1
            yield Block(page, start + 1, None, "\n".join(lines[start : number + 1]))
        number += 1


def is_run(block: Block) -> bool:
    above = block.page.read_text().splitlines()[block.line - 2]
    return not above.startswith("<!-- not run by the tests")


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page), flags=re.DOTALL)
    return [" ".join(span.replace("\\|", "|").split()) for span in spans]


PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]


# --- commands -------------------------------------------------------------------------------------


def words_of(line: str) -> list[str]:
    """The words of a line as bash splits it; comments are left out."""

    def unescape(quoted: re.Match) -> str:
        return shlex.quote(ast.literal_eval(f"'''{quoted[1]}'''"))

    words = shlex.shlex(re.sub(r"\$'([^']*)'", unescape, line), posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    return list(words)


def command_among(words: list[str]) -> tuple[str, list[str]] | None:
    """A command of ours among these words, and its arguments. A launcher may stand before it."""
    for number, word in enumerate(words):
        name = "cera-train" if word == "cera_train" and words[number - 1] == "-m" else word
        if name in (*SCHEMAS, *OF_FOLDERS):
            return name, list(
                itertools.takewhile(lambda word: word not in (";", "&&", "|"), words[number + 1 :])
            )
    return None


def commands_of(page: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Every command of ours: its place, its name, its arguments."""
    for block in blocks(page):
        if block.language in ("python", "json"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            is_command = re.match(r"(cera-\w+|torchrun|accelerate|srun|for) ", line)
            if is_command and (command := command_among(words_of(line))):
                yield str(block), *command
    for span in inline_code(page):
        if re.match(r"cera-\w+ \S", span) and (command := command_among(words_of(span))):
            yield page.name, *command


COMMANDS = [command for page in PAGES for command in commands_of(page)]
CHECKED = {
    (name, *arguments): (place, name, arguments) for place, name, arguments in COMMANDS
}.values()


def values_of(override: Override) -> list[str]:
    """The override with each value of its sweep, or with the first of a range that a sweeper draws
    from."""
    if not override.is_sweep_override():
        return [override.input_line]
    values = override.value()
    drawn = (
        [values.start] if isinstance(values, IntervalSweep) else override.sweep_string_iterator()
    )
    return [f"{override.get_key_element()}={value}" for value in drawn]


def jobs_of(arguments: list[str]) -> list[list[str]]:
    """Jobs of a sweep that together have every value of these arguments. tests/sweep composes those
    of conf/sweep."""
    dimensions = [
        values_of(override) for override in OverridesParser.create().parse_overrides(arguments)
    ]
    return [
        [values[number % len(values)] for values in dimensions]
        for number in range(max(map(len, dimensions), default=1))
    ]


def overrides_of(arguments: list[str]) -> tuple[list[str], bool]:
    """The overrides among these arguments, without flags and without Hydra's section; and whether
    they are a sweep."""
    settings = []
    words = iter(arguments)
    for word in words:
        if word == "--cfg":
            next(words)
        elif not word.startswith("-"):
            settings.append(word)
    for launcher in (
        word.partition("=")[2] for word in settings if word.startswith("hydra/launcher=")
    ):
        known = {path.stem for path in (config_dir("conf") / "hydra" / "launcher").glob("*.yaml")}
        assert launcher in known
    return [
        word for word in settings if not word.lstrip("+").startswith("hydra")
    ], "-m" in arguments


def test_the_pages_contain_commands():
    assert len(COMMANDS) >= 60
    assert {name for _, name, _ in COMMANDS} == {*SCHEMAS, *OF_FOLDERS}


@pytest.mark.parametrize(
    ("place", "name", "arguments"), CHECKED, ids=[f"{place} {name}" for place, name, _ in CHECKED]
)
def test_every_command_composes_to_a_checked_config(compose, place, name, arguments):
    if name not in SCHEMAS or {"--help", "-sc", "--config-dir"} & {*arguments}:
        return
    overrides, is_sweep = overrides_of(arguments)
    jobs = jobs_of(overrides) if is_sweep else [overrides]
    for job in jobs:
        if any(word.startswith("run=") for word in job) and name == "cera-plan":
            assert [word.partition("=")[0] for word in job] == ["run"]
            continue
        assert compose(*job, command=name.removeprefix("cera-")) is not None


@pytest.mark.slow
def test_the_smallest_study_answers_its_question(run_command, tmp_path, tiny_folder, capfd):
    """With two rates, seeds and updates in place of the page's, and several jobs at once."""
    page = ROOT / "docs" / "studies.md"
    file = next(block.text for block in blocks(page) if block.language == "yaml")
    study = yaml.safe_load(file)["study"]
    runs = len(study["arms"]) * len(study["tune"]["optimizer.lr"]) * study["seeds"]
    assert f"with {runs} runs" in prose(page)
    (tmp_path / "mine" / "study").mkdir(parents=True)
    (tmp_path / "mine" / "study" / "orders.yaml").write_text(file)
    rows = [{"question": f"{n} apples?", "answer": f"count={n}"} for n in range(60)]
    write_lines(tmp_path / "rows.jsonl", rows)
    short = [f"model.path={tiny_folder}", "model.dtype=float32", "train.max_updates=2"]
    short += ["data.max_length=64", "study.tune={optimizer.lr:[1e-3,2e-3]}"]
    command = ["-m", "--config-dir", "mine", "+study=orders", "hydra/launcher=joblib", *short]
    assert run_command("cera-train", *command, "study.seeds=2") == 0
    assert run_command("cera-report", "outputs/orders") == 0
    assert "cera - lora" in capfd.readouterr().out


# --- Python ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(compose, tmp_path_factory) -> Path:
    """A folder with outputs/quickstart, a run of two updates, and its export."""
    from cera_train.serving.export import export_run
    from cera_train.training.train import train

    folder = tmp_path_factory.mktemp("docs")
    changes = ("train.max_updates=2", "train.eval_every=null", f"output_dir={folder / 'outputs'}")
    train(compose("+recipe=logistic_map", "name=quickstart", *changes))
    run = folder / "outputs" / "quickstart"
    export_run(compose(f"run={run}", "rows=2", "at_most=10", command="export"))
    # The run that docs/train.md makes.
    shutil.copytree(run, folder / "outputs" / "by_token")
    return folder


@pytest.mark.slow
@needs_smollm2
@pytest.mark.filterwarnings("default")  # of TRL and transformers: the blocks are a user's program
@pytest.mark.parametrize(
    "page", sorted({block.page for block in PYTHON} - {*API}), ids=lambda page: page.name
)
def test_every_python_block_runs(quickstart, monkeypatch, capsys, page):
    """The blocks of a page run one after the other, as a reader would type them."""
    monkeypatch.chdir(quickstart)
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in PYTHON:
        if block.page == page and is_run(block):
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", API, ids=lambda page: page.name)
def test_the_examples_of_the_api_print_what_they_show(capsys, page):
    example, shown = [block for block in blocks(page) if block.language is not None]
    exec(compile(example.text, str(page), "exec"), {"__name__": "__docs__"})
    assert capsys.readouterr().out.strip() == shown.text


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_every_import_in_a_python_block_exists(block):
    """Also blocks that are not run, and if the real model is not installed."""
    assert not failing_imports(block.text)


# --- names ----------------------------------------------------------------------------------------


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
def test_every_named_file_exists(page):
    """Paths from the top of the project, and tasks/gsm8k.py for one of cera_train/."""
    tops = {
        path.name
        for folder in (ROOT, ROOT / "cera_train")
        for path in folder.iterdir()
        if path.is_dir()
    }
    for span in inline_code(page):
        path = span.rstrip("/")
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", span) or re.fullmatch(
            r"[\w-]+\.(py|toml)|[\w-]+/", span
        )
        if (
            not is_path
            or span.startswith(MADE_BY_COMMANDS)
            or path.split("/")[0] not in tops
            or "NAME" in span
        ):
            continue
        assert (ROOT / path).exists() or (ROOT / "cera_train" / path).exists(), span


# --- shape ----------------------------------------------------------------------------------------


def test_the_readme_has_at_most_120_lines_and_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    pages = {page.name for page in DOCS} - {"index.md"}  # the site's first page
    assert all(f"(docs/{name})" in text for name in pages)


def test_the_readmes_tree_is_the_real_one():
    tree = next(
        block.text for block in blocks(ROOT / "README.md") if block.text.startswith("cera_train/")
    )
    named = {*re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE)}
    assert named == {path.parent.name for path in (ROOT / "cera_train").glob("*/__init__.py")}
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE))


# --- the tutorial and the notebook ----------------------------------------------------------------

SHORT = {
    "cera-train": "train.max_updates=2 train.eval_every=2 train.tasks_limit=4 data.eval_rows=20",
    "cera-eval": "task.limit=4 task.max_new_tokens=16",
    "cera-export": "at_most=10",
}
"""Arguments that let a command finish in seconds."""


def form(text: str) -> list[str]:
    """The lines of an output without numbers, names of layers and repetitions. A line that depends
    on the machine or on the rows, or is a model's answer, keeps only its first word."""
    arbitrary = r"^(precision|device|speed|example|asked|before|after|at most|needs)\b.*"
    lines: list[str] = []
    for line in text.splitlines():
        line = " ".join(line.split())
        line = re.sub(arbitrary, r"\1", line)
        line = re.sub(r"[+-]?\d[\d.,:]*", "#", line).replace("v_proj", "q_proj")
        if lines[-1:] != [line]:
            lines.append(line)
    return lines


def has_form(printed: str, shown: str) -> bool:
    """Whether an output has the lines that the page shows, with any others in place of `...`."""
    patterns = [r"(.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in form(shown)]
    return re.fullmatch("".join(patterns), "\n".join(form(printed)) + "\n") is not None


@pytest.mark.slow
@needs_smollm2
def test_the_tutorial_prints_what_it_shows(tmp_path):
    page = [block for block in blocks(ROOT / "docs" / "tutorial.md") if block.language != "python"]
    steps = [
        pair
        for pair in itertools.pairwise(page)
        if [block.language for block in pair] == [None, ""]
    ]
    assert len(steps) == 7
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block, shown in steps:
        command = block.text.replace("make quickstart", "cera-train +recipe=quickstart")
        for name, arguments in SHORT.items():
            command = re.sub(rf"\b{name}\b", f"{name} {arguments}", command)
        shell = ["bash", "-e", "-o", "pipefail", "-c", command]
        done = subprocess.run(
            shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        if "cera-chat" in command:
            assert done.stdout.strip()  # a model's answers after two updates are arbitrary
        else:
            assert has_form(done.stdout, shown.text), f"{command} printed\n{done.stdout}"


def printed_by(notebook: dict) -> list[list[str]]:
    """What each cell prints, in however many pieces."""
    printed = []
    for cell in notebook["cells"]:
        outputs = [output for output in cell.get("outputs", []) if output.get("name") == "stdout"]
        printed.append(form("".join("".join(output["text"]) for output in outputs)))
    return printed


@pytest.mark.nightly
@needs_smollm2
@pytest.mark.filterwarnings("default")  # Jupyter's, of its event loop
def test_the_notebook_prints_what_it_shows(tmp_path):
    """`jupyter execute --inplace docs/notebook.ipynb` writes its outputs again; take the warnings
    out."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    expected = printed_by(notebook)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert printed_by(notebook) == expected
    assert (tmp_path / "outputs/capitals/adapter/adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site of `make docs`. mkdocs itself refuses a link that leads nowhere."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    build = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    python("-m", *build, cwd=ROOT, NO_MKDOCS_2_WARNING="1")
    return folder


@pytest.mark.slow
def test_the_site_has_every_page(site):
    assert {path.stem for path in DOCS} <= {path.stem for path in site.rglob("*.html")}

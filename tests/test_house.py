"""How the code is written, where ruff has no rule. `make lint` runs this file alone."""

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cera_train", "benchmarks", "tests")
FILES = [file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*.py")]


def is_swap(names: list[ast.expr], values: list[ast.expr]) -> bool:
    return sorted(map(ast.unparse, names)) == sorted(map(ast.unparse, values))


def is_text(node: ast.expr) -> bool:
    """Text, or a list, written where it stands. A mask may multiply a tensor."""
    is_constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_constant or isinstance(node, ast.JoinedStr | ast.List)


def is_flag(node: ast.expr) -> bool:
    """A condition, or the name of one."""
    match node:
        case ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.startswith(("is_", "has_"))
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith")):
            return True
    return False


def mistakes(code: str) -> Iterator[tuple[int, str]]:
    """The line of each, and its fix."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                is_starred = any(isinstance(name, ast.Starred) for name in names)
                if not is_starred and not is_swap(names, values):
                    yield node.lineno, "assign each name on a line of its own"
            case ast.For(iter=ast.IfExp() as rows) | ast.comprehension(iter=ast.IfExp() as rows):
                yield rows.lineno, "a loop hides a condition: give what it loops over a name"
            case ast.BinOp(op=ast.Mult(), left=text, right=flag):
                if is_text(text) and is_flag(flag):
                    yield node.lineno, "a flag multiplies text: write `text if flag else ''`"


def test_a_line_holds_one_statement():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {fix}"
        for file in FILES
        for line, fix in mistakes(file.read_text())
    ]
    assert len(FILES) > 200
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("a, b = x, y", 1),
        ("a, b = b, a\na, *b = 1, 2\nheight, width = sizes", 0),
        ("for x in rows if rows else (): print(x)\n[x for x in a if x]", 1),
        ("{x for x in (a if b else c)}", 1),
        ("'!' * is_loud + f'{a}' * (a > b)\n['--fast'] * (not self.has_end)", 3),
        ("'!' * text.startswith('a')", 1),
        ("'-' * width + [0] * count + tensor * is_kept", 0),
    ],
)
def test_the_check_finds_what_it_is_for(code, count):
    assert len([*mistakes(code)]) == count


# --- where a test is ------------------------------------------------------------------------------

ACROSS = {"compatibility", "faults", "gpu", "integrations", "properties"}
"""Folders of tests of several rooms at once. Every other test stands where its module does."""


def has_module(test: Path) -> bool:
    """Whether `tests/X/test_Y.py` has `cera_train/X/Y.py` or the folder `X/Y`, and
    `tests/X/Y/test_Z.py` of a module with several files of tests has `X/Y.py`."""
    folder = ROOT / "cera_train" / test.parent.relative_to(ROOT / "tests")
    module = folder / test.name.removeprefix("test_")
    return any(
        place.exists() for place in (module, module.with_suffix(""), folder.with_suffix(".py"))
    )


def test_a_test_stands_where_its_module_does():
    tests = [
        file
        for folder in (ROOT / "tests").iterdir()
        if folder.name not in ACROSS
        for file in folder.glob("**/test_*.py")
    ]
    assert len(tests) > 50
    astray = [str(test.relative_to(ROOT)) for test in tests if not has_module(test)]
    assert not astray, f"{astray}: name each after its module, or move it to one of {ACROSS}"


# --- how much there is to read --------------------------------------------------------------------

BUDGETS = {
    "cera_train/adapters": 7_459,
    "cera_train/cera": 7_667,
    "cera_train/cli": 5_947,
    "cera_train/common": 4_815,
    "cera_train/data": 15_655,
    "cera_train/distributed": 2_357,
    "cera_train/evaluation": 15_125,
    "cera_train/model": 8_192,
    "cera_train/planning": 5_690,
    "cera_train/report": 8_033,
    "cera_train/runs": 8_317,
    "cera_train/serving": 7_771,
    "cera_train/settings": 6_741,
    "cera_train/study": 7_365,
    "cera_train/sweep": 3_549,
    "cera_train/training": 11_775,
    "cera_train/verdicts": 3_288,
    "cera_train": 130_000,
    "tests": 128_450,
    "benchmarks": 28_000,
}
"""The most tokens of Python in a folder: what a reader has to read."""

UNREAD = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FSTRING = [getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END")]  # Python 3.12


def tokens(code: str) -> int:
    """The number of tokens, without comments and docstrings. An f-string is one, as in Python 3.11:
    joining or breaking lines, or another Python, changes nothing."""
    count = 0
    depth = 0
    begins_statement = True
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        is_docstring = token.type == tokenize.STRING and begins_statement
        if token.type == FSTRING[1]:
            depth -= 1
        elif depth == 0 and token.type not in UNREAD and not is_docstring:
            count += 1
        if token.type == FSTRING[0]:
            depth += 1
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins_statement = token.type in UNREAD
    return count


@functools.cache
def tokens_in(file: Path) -> int:
    return tokens(file.read_text())


def test_a_folder_keeps_to_its_budget():
    rooms = {path.parent for path in (ROOT / "cera_train").glob("*/__init__.py")}
    assert {room.relative_to(ROOT).as_posix() for room in rooms} <= BUDGETS.keys()
    sizes = {folder: sum(map(tokens_in, (ROOT / folder).glob("**/*.py"))) for folder in BUDGETS}
    over = [
        f"{folder} has {size:,} tokens of {BUDGETS[folder]:,}"
        for folder, size in sizes.items()
        if size > BUDGETS[folder]
    ]
    spare = {folder: BUDGETS[folder] - size for folder, size in sizes.items()}
    most = sorted(spare, key=spare.get, reverse=True)[:3]
    assert not over, (
        "; ".join(over) + ". Take something out of it, or lower the budget of a folder with tokens "
        "to spare: " + ", ".join(f"{folder} has {spare[folder]:,}" for folder in most) + "."
    )


def test_tokens_are_those_of_a_reader():
    function = 'def f():\n    "Doc."\n    return (\n        x\n    )\n'
    assert tokens('"""Doc."""\nx = f"{a + b}"  # why\n\n\n' + function) == 3 + 5 + 4

"""How the code is written, where ruff has no rule. `make lint` runs this file alone."""

import ast
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

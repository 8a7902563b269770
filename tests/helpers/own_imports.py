"""Imports from cera_train in code that a test does not run."""

import ast


def failing_imports(code: str) -> list[str]:
    """Those that fail, also of functions: a line for each."""
    failing = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cera_train"):
            statement = ast.unparse(node)
            try:
                exec(statement, {})
            except ImportError as error:
                failing.append(f"{statement}: {error}")
    return failing

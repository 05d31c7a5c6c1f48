"""Prints the ten largest files and functions of the package: a nudge, not a law."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "supple"
TOP = 10


def docstring_lines(node: ast.AST) -> int:
    """Counts the lines of a function's docstring."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not node.body:
        return 0
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return (first.end_lineno or 0) - first.lineno + 1
    return 0


def functions(path: Path) -> list[tuple[int, str]]:
    """Gives the length without docstring and the place of each function of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node)
            found.append((length, f"{path.relative_to(ROOT.parent)}:{node.lineno} {node.name}"))
    return found


def main() -> None:
    """Prints both tables."""
    paths = sorted(ROOT.rglob("*.py"))
    files = [
        (len(path.read_text(encoding="utf-8").splitlines()), str(path.relative_to(ROOT.parent)))
        for path in paths
    ]
    lengths = [entry for path in paths for entry in functions(path)]
    print(f"{len(files)} files, {sum(lines for lines, _ in files)} lines; the largest:")
    for lines, name in sorted(files, reverse=True)[:TOP]:
        print(f"{lines:6} {name}")
    print(f"{len(lengths)} functions; the longest (lines without docstring):")
    for lines, name in sorted(lengths, reverse=True)[:TOP]:
        print(f"{lines:6} {name}")


if __name__ == "__main__":
    main()

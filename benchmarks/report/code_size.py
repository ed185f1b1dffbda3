"""Size of the library and of its tests: lines of code, functions, comments.

    python benchmarks/report/code_size.py [FOLDER ...]

Lines of code are those without blank ones, comments and docstrings; a function's length is that of
its code. Without folders: fisherfast, tests, benchmarks, examples.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fisherfast", "tests", "benchmarks", "examples")
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def code_lines(text: str) -> tuple[set[int], int]:
    """Numbers of the lines of code of a file, and how many have a comment."""
    lines: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comments += token.type == tokenize.COMMENT
        if token.type not in SILENT and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))  # a docstring
    return lines, comments


def functions(text: str, lines: set[int]) -> Iterator[tuple[int, str]]:
    """Length and name of each function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = range(node.lineno, (node.end_lineno or 0) + 1)
            yield sum(number in lines for number in own), node.name


def size_of(folder: Path) -> str:
    """One line for a folder."""
    code, comments, files, all_lines = 0, 0, 0, 0
    found: list[tuple[int, str]] = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines, own = code_lines(text)
        files, all_lines = files + 1, all_lines + text.count("\n")
        code, comments = code + len(lines), comments + own
        found += [(n, f"{path.relative_to(folder)}:{name}") for n, name in functions(text, lines)]
    longest = max(found, default=(0, "-"))
    median = statistics.median(n for n, _ in found) if found else 0
    return (
        f"{folder.name}: {files} files, {all_lines} lines, {code} of code; {len(found)} functions,"
        f" median {median:g} lines, longest {longest[0]} ({longest[1]});"
        f" {100 * comments / max(code, 1):.1f} comments per 100 lines"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or FOLDERS:
        print(size_of(ROOT / name))

"""The imports of a source file, wherever they hide."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

IMPORT_FUNCTIONS = ("__import__", "import_module", "importlib.import_module")


@dataclass(frozen=True)
class Import:
    """One imported module, wherever in the file it stands."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports_in(source: str, file: str, known: set[str]) -> Iterator[Import]:
    """Every import in a file: in functions and under TYPE_CHECKING, too, and through importlib with a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            module = node.module or ""
            children = {f"{module}.{alias.name}" for alias in node.names} & known
            yield from (Import(file, node.lineno, name) for name in children or {module})
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORT_FUNCTIONS:
            literals = [argument for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from (Import(file, node.lineno, str(literal.value)) for literal in literals)

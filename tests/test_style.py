"""The house style that can be read from the source: public functions have type hints."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for pattern in ("*.py", "models/*.py", "dataset/*.py", "engine/*.py",
                                    "deploy/*.py") for path in ROOT.glob(pattern))
UNTYPED = ("self", "cls", "ctx")


def missing_hints(source):
    """Return a line for each public function or method that lacks hints, and what lacks one."""
    return [f"line {node.lineno}: {name}: {', '.join(missing)}"
            for name, node in public_functions(ast.parse(source).body)
            if (missing := untyped_parts(node))]


def public_functions(body, prefix=""):
    """Yield (name, node) of the functions of a module and the methods of its classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_"):
                yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from public_functions(ast.iter_child_nodes(node), prefix)


def untyped_parts(function):
    """Return the parameters of a function without a hint, and "return" where that has none."""
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, arguments.vararg,
                  *arguments.kwonlyargs, arguments.kwarg]
    missing = [parameter.arg for parameter in parameters
               if parameter and parameter.annotation is None and parameter.arg not in UNTYPED]
    if function.returns is None:
        missing.append("return")
    return missing


def test_public_functions_have_type_hints():
    assert {path.name for path in FILES} >= {"train.py", "utils.py", "quan_ops.py", "loader.py"}
    missing = [f"{path.relative_to(ROOT)}, {line}"
               for path in FILES for line in missing_hints(path.read_text())]
    assert not missing, "without type hints:\n" + "\n".join(missing)


@pytest.mark.parametrize("source, expected", [
    ("def f(x: int, *rest: str, y: int = 1, **more: int) -> None: ...", []),
    ("def f(x, *rest, y=1, **more): ...", ["line 1: f: x, rest, y, more, return"]),
    ("def f(x: int): ...", ["line 1: f: return"]),
    ("def _f(x): ...", []),
    ("class C:\n def f(self, x) -> int: ...", ["line 2: C.f: x"]),
    ("class C:\n def __init__(self, x): ...", []),
    ("class _C:\n def f(self, x): ...", []),
    ("if True:\n def f() : ...", ["line 2: f: return"]),
    ("def f() -> None:\n def inner(x): ...", []),
])
def test_missing_hints(source, expected):
    assert missing_hints(source) == expected

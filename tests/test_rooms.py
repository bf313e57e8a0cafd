"""No circle of imports anywhere in the package: not of two files, not under TYPE_CHECKING, not inside functions."""

import ast
from pathlib import Path

import hf_sparse_peft

ROOT = Path(hf_sparse_peft.__file__).parent


def modules():
    """Dotted name of every module of the package -> its file."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def parents(name):
    """The packages that a module lies in: importing it runs their `__init__.py` first."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def imports_of(name, file, known):
    """Modules of the package that `file` names in an import, wherever it stands."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                if target in known or source in known:
                    yield target if target in known else source


def circles(graph):
    """Strongly connected components of more than one module (Tarjan), largest first."""
    order, low, stack, found = {}, {}, [], []

    def visit(node):
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            at = stack.index(node)
            found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in order:
            visit(node)
    return sorted((one for one in found if len(one) > 1), key=len, reverse=True)


def test_no_circle_of_imports():
    known = modules()
    graph = {}
    for name, file in known.items():
        named = set(imports_of(name, file, known)) - {name}
        graph[name] = named.union(*(parents(one) - parents(name) for one in named)) - {name}
    assert circles(graph) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]

"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build`. The reference is generated from the package."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import hf_sparse_peft  # noqa: E402
from hf_sparse_peft.utils.parts import Part, part_types  # noqa: E402

project = "hf_sparse_peft"
author = "the hf_sparse_peft authors"
copyright = "the hf_sparse_peft authors, Apache-2.0"
release = version = hf_sparse_peft.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write `name`, as Markdown does
nitpicky = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "none"  # types of arguments stand in signatures, those of options in the words of their range
autodoc_member_order = "bysource"
add_module_names = False

html_theme = "furo"
html_title = f"hf_sparse_peft {release}"
html_show_sphinx = False

ROOMS = {
    "hf_sparse_peft.tuners": "Tuners and configs",
    "hf_sparse_peft.methods": "Methods by name",
    "hf_sparse_peft.preflight": "Before a run",
    "hf_sparse_peft.training": "Training",
    "hf_sparse_peft.finetuning": "Runs from a YAML file",
    "hf_sparse_peft.rules": "Rules",
    "hf_sparse_peft.sparsity": "Scores, budgets, patterns, curves",
    "hf_sparse_peft.optim": "Optimizers",
    "hf_sparse_peft.hub": "Files, cards, export",
    "hf_sparse_peft.hub.analysis": "Analysis of adapters and checkpoints",
    "hf_sparse_peft.pruning": "Pruning",
    "hf_sparse_peft.merging": "Merging",
    "hf_sparse_peft.federated": "Federated training",
}
"""Module whose `__all__` is documented -> title of its page."""


def write_reference(app) -> None:
    """One page a room with every public name of it, and one with every part that a config file may name."""
    folder = HERE / "reference"
    folder.mkdir(exist_ok=True)
    shown: set[int] = set()  # several rooms offer some names; each is described once
    pages = {module.removeprefix("hf_sparse_peft."): _room(module, title, shown) for module, title in ROOMS.items()}
    pages["parts"] = _parts()
    toc = "\n".join(sorted(pages))
    pages["index"] = (
        "# Reference\n\nGenerated from the docstrings: every public name, by the room that it lives in, and every part "
        f"by the name that config files use.\n\n```{{toctree}}\n:maxdepth: 1\n\n{toc}\n```\n"
    )
    for name, text in pages.items():
        file = folder / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:  # unchanged pages are not built again
            file.write_text(text, encoding="utf-8")


def _room(module_name: str, title: str, shown: set[int]) -> str:
    module = importlib.import_module(module_name)
    lines = [f"# {title}", "", f"`{module_name}`: {inspect.getdoc(module).splitlines()[0]}", ""]
    for name in sorted(module.__all__, key=lambda name: (not name.endswith("Config"), name.lower())):
        found = getattr(module, name)
        if not callable(found) or id(found) in shown or not getattr(found, "__module__", "").startswith(project):
            continue
        shown.add(id(found))
        directive = "autoclass" if inspect.isclass(found) else "autofunction"
        members = ["   :members:"] if inspect.isclass(found) and not issubclass(found, Part) else []
        lines += ["```{eval-rst}", f".. {directive}:: {module_name}.{name}", *members, "```", ""]
    return "\n".join(lines)


def _parts() -> str:
    lines = ["# Parts by name", "", "What stands behind a `type` in `adapter_config.json`, kind by kind.", ""]
    kinds = {cls.part_kind: cls for cls in _subclasses(Part) if cls.part_kind}
    for title, base in sorted(kinds.items()):
        entries = part_types(base)
        if not entries:
            continue
        lines += [f"## {title}", "", "| name | class | what it is |", "|---|---|---|"]
        for name, cls in entries.items():
            summary = " ".join(inspect.cleandoc(cls.__doc__).partition("\n\n")[0].split()).replace("|", "\\|")
            lines.append(f"| `{name}` | `{cls.__name__}` | {_as_markdown(summary)} |")
        lines.append("")
    return "\n".join(lines)


def _as_markdown(text: str) -> str:
    """Inline math of a docstring as Markdown has it."""
    before, marker, rest = text.partition(":math:`")
    if not marker:
        return text
    formula, _, behind = rest.partition("`")
    return f"{before}${formula}${_as_markdown(behind)}"


def _subclasses(cls: type) -> set[type]:
    return {cls} | {found for child in cls.__subclasses__() for found in _subclasses(child)}


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text to whoever reads the source: what reStructuredText takes for markup is escaped, and
    indented examples and tables above the sections become literal blocks."""
    found, literal, in_sections = [], False, False
    for number, line in enumerate(lines):
        in_sections = in_sections or bool(re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes|Example):", line))
        starts_block = not in_sections and line[:1] in (" ", "|") and number and not lines[number - 1].strip()
        if starts_block and not literal and not _in_list(lines[:number]):
            found += ["::", ""]
            literal = True
        elif line.strip() and line[:1] not in (" ", "|"):
            literal = False
        found.append(f"    {line}" if literal and line.strip() else line if literal else _escaped(line))
    lines[:] = found


def _in_list(before: list[str]) -> bool:
    """Whether the last line above that is not indented begins an item of a list."""
    last = next((line for line in reversed(before) if line.strip() and not line.startswith(" ")), "")
    return bool(re.match(r"[-*] |\d+[.)] ", last))


def _escaped(line: str) -> str:
    """`line` with `|x|` and `**x` escaped outside of literals and math."""
    pieces = re.split(r"(:math:`[^`]*`|`[^`]*`)", line)
    return "".join(p if p.startswith(("`", ":math:")) else re.sub(r"\||\*\*(?=\w)", _escape, p) for p in pieces)


def _escape(found: re.Match) -> str:
    return "".join("\\" + character for character in found.group())


def setup(app) -> None:
    """Write the reference before its pages are read, and read docstrings before napoleon does."""
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-process-docstring", as_rst, priority=100)

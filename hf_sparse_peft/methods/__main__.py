"""`python -m hf_sparse_peft.methods docs/methods.md` writes the tables of methods between the markers of that page, or
of docs/optimizers.md; without a file they are printed."""

import sys
from pathlib import Path

from . import claims_table, functions_markdown, markdown_table, whole_table

TABLES = {"method table": markdown_table, "function table": functions_markdown, "claims": claims_table}
TABLES["whole-weight table"] = whole_table


def write(page: Path) -> None:
    """Put today's tables between the markers of `page`."""
    text = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if begin not in text:
            continue
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise ValueError(f"{page} has '{begin.strip()}' and no '{end.strip()}' on a line of its own behind it.")
        text = before + begin + table() + end + rest.partition(end)[2]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]))
    else:
        print("\n\n".join(table() for table in TABLES.values()))

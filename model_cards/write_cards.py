"""Run every recipe as it is shipped, and keep the card that it writes here.

    python model_cards/write_cards.py                     # all, some minutes on two CPU cores
    python model_cards/write_cards.py dpo sft_chat        # some

`README.md` beside this file gets a table of cards, between its markers, with the command that made each.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.with_suffix(".yaml").exists())
WITHOUT_CARD = {"grpo_patches"}
"""Their adapter is compared with its patches and thrown away."""
PICTURES = {"qlora_sparse_lora": "report.png"}
MARKERS = ("<!-- cards -->", "<!-- end of cards -->")


def run(name: str) -> None:
    """Run a recipe from the project's folder; copy its card, and its picture where that is kept."""
    subprocess.run([sys.executable, f"recipes/{name}.py"], cwd=ROOT, check=True)
    output = ROOT / "runs" / name
    shutil.copy(output / "adapter" / "README.md", HERE / f"{name}.md")
    if name in PICTURES:
        shutil.copy(output / PICTURES[name], HERE / f"{name}_{PICTURES[name]}")


def table() -> str:
    """The cards that are here, and what made them."""
    lines = ["| card | made by | what it is |", "|---|---|---|"]
    for name in RECIPES:
        if (HERE / f"{name}.md").exists():
            what = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            lines.append(f"| [{name}.md]({name}.md) | `python recipes/{name}.py` | {what} |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Run the recipes called `names`, or all; renew the table.

    Raises:
        SystemExit: a name that no recipe with a card has.
    """
    known = [name for name in RECIPES if name not in WITHOUT_CARD]
    if unknown := set(names) - set(known):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no recipe with a card. Known are {', '.join(known)}.")
    for name in names or known:
        run(name)
    readme = HERE / "README.md"
    start, end = map(re.escape, MARKERS)
    inside = f"{MARKERS[0]}\n{table()}\n{MARKERS[1]}"
    readme.write_text(re.sub(rf"{start}.*{end}", inside, readme.read_text(encoding="utf-8"), flags=re.S))


if __name__ == "__main__":
    main(sys.argv[1:])

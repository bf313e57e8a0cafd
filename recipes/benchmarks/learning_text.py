r"""English to pretrain a base on for `learning.py --task e2e`, from the same folder of real data: a document a line.

    python recipes/benchmarks/learning_text.py --data DATA --output english.txt
    python recipes/pretrain_demo_base.py --output_dir english --text english.txt --vocab_size 2048 --hidden_size 256 \
        --intermediate_size 704 --heads 8 --kv_heads 4 --steps 1500    # a quarter of an hour on one CPU core

Questions and answers of GSM8K's training split, sentences of SST-2's and CoLA's: nothing of E2E.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import harness
from harness import option


@dataclass
class TextOptions:
    """Options of this program."""

    data: Path = option(None, "folder with gsm8k/train.jsonl, sst2/train.tsv and cola/train.tsv")
    output: Path = option(Path("english.txt"), "file of the documents")


def documents(data: Path) -> list[str]:
    """All of them, in an order of seed 0."""
    found = []
    for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", row["answer"]).replace("#### ", "The answer is ")
        found += [text.replace("\n", " ") for text in (row["question"], answer)]
    found += [line.rsplit("\t", 1)[0] for line in (data / "sst2" / "train.tsv").read_text().splitlines()]
    found += [line.split("\t")[3] for line in (data / "cola" / "train.tsv").read_text().splitlines()]
    random.Random(0).shuffle(found)
    return found


def main(argv: list[str] | None = None) -> None:
    """Write the file."""
    options = harness.parse(TextOptions, __doc__, argv)
    if options.data is None:
        raise SystemExit("--data: the folder with the data sets is needed.")
    found = documents(options.data)
    options.output.write_text("\n".join(found) + "\n")
    print(f"{len(found):,} documents, {sum(map(len, found)):,} characters: {options.output}")


if __name__ == "__main__":
    main()

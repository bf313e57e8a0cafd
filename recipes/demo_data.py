"""Text for the embedded demo: what the small base reads, and the word problems it is then taught to answer.

Everything is made from templates by seed, so the demo needs no network. Three sets that do not overlap:

    pretraining_text(split="train")    arithmetic lines, counting, stories ("Now Tom has 12 apples .")  -> the base
    pretraining_text(split="heldout")  the same kinds of documents, none of them in "train"            -> forgetting
    word_problems(split="train"|"test")  questions with answers in a form the base never gives         -> the task

The base knows the sums and the stories, but after "How many apples does he have ? Answer :" it has read an answer in
words ("twelve .") nine times in ten, and that is what it says. The task wants the bare number (" 12") and then the end.
A (a, op, b) triple of the test problems is in no training problem, and the base read none of them answered in digits
after this question. So a model cannot score by remembering answers: it has to give the arithmetic that is already in
the base the form it is asked for.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence

from datasets import Dataset

from hf_sparse_peft.finetuning.data import IGNORED, chunk_text, in_chat_template, tokenize_pairs  # noqa: F401

LARGEST = 20
"""Every number in the arithmetic is at most this, so that each is a single token."""
TEST_SHARE = 5
"""One arithmetic triple in this many is kept for the test problems."""
HELDOUT_SHARE = 20
"""One pretraining document in this many is held out."""

NAMES = {
    "he": ("Tom", "Sam", "Ben", "Max", "Leo", "Paul", "Hugo", "Omar"),
    "she": ("Anna", "Mia", "Lily", "Zoe", "Nina", "Sara", "Emma", "Ruth"),
}
OBJECTS = (
    "apples", "books", "coins", "cards", "eggs", "pens", "stones", "shells",
    "stamps", "cakes", "pears", "keys", "balls", "cups", "hats", "seeds",
)  # fmt: skip
GAINS = ("buys {b} more", "finds {b} more", "gets {b} more", "wins {b} more")
LOSSES = ("loses {b}", "sells {b}", "drops {b}", "gives away {b}")
ENDINGS = (
    "Now {name} has {c} {thing} .",
    "In the end {pron} has {c} {thing} .",
    "After that {pron} has {c} {thing} .",
    "So there are {c} {thing} now .",
    "That makes {c} {thing} .",
    "{name} counts the {thing} : {c} .",
    "Total : {c} .",
    "How many {thing} are there ? There are {c} .",
    "How many now ? {c} {thing} .",
    "How many {thing} does {pron} have ? Total : {c} .",
)
"""Many ways to say the result, so that the base can work it out after any words, not after one phrase."""
QUESTION = "How many {thing} does {pron} have ? Answer :"
IN_WORDS, IN_DIGITS = QUESTION + " {word} .", QUESTION + " {c} ."
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
PLACES = ("park", "river", "school", "market", "forest", "garden", "beach", "station")
ANIMALS = ("dog", "cat", "bird", "horse", "fox", "duck", "sheep", "rabbit")
THINGS = ("ball", "kite", "boat", "hat", "lamp", "door", "chair", "bag")
LEGS = {"dog": "four", "cat": "four", "bird": "two", "horse": "four", "fox": "four", "duck": "two", "sheep": "four"}


def triples() -> list[tuple[int, str, int, int]]:
    """All `(a, op, b, result)` with 2 <= a, result <= LARGEST and b >= 1. Two at least, so that plurals stay right."""
    found = []
    for a in range(2, LARGEST + 1):
        found += [(a, "+", b, a + b) for b in range(1, LARGEST - a + 1)]
        found += [(a, "-", b, a - b) for b in range(1, a - 1)]
    return found


def _bucket(content: str, buckets: int) -> int:
    # crc32, not hash(): hash() of a string changes with every process.
    return zlib.crc32(content.encode()) % buckets


def _is_test(triple: tuple[int, str, int, int]) -> bool:
    a, op, b, _ = triple
    return _bucket(f"{a} {op} {b}", TEST_SHARE) == 0


def _person(rng: random.Random) -> tuple[str, str]:
    pronoun = rng.choice(("he", "she"))
    return rng.choice(NAMES[pronoun]), pronoun


def _facts(rng: random.Random, pool: Sequence[tuple[int, str, int, int]]) -> str:
    return " ".join(f"{a} {op} {b} = {c} ." for a, op, b, c in rng.sample(pool, 4))


def _counting(rng: random.Random) -> str:
    start, length = rng.randint(0, LARGEST - 4), rng.randint(4, 8)
    numbers = list(range(start, min(start + length, LARGEST + 1)))
    if rng.random() < 0.5:
        numbers.reverse()
    return " , ".join(map(str, numbers)) + " ."


def _number_story(rng: random.Random, pool: Sequence[tuple[int, str, int, int]]) -> str:
    a, op, b, c = rng.choice(pool)
    name, pronoun = _person(rng)
    thing = rng.choice(OBJECTS)
    change = rng.choice(GAINS if op == "+" else LOSSES).format(b=b)
    ending = rng.choice(ENDINGS)
    if rng.random() < 0.25:
        # A base to which digits here were impossible would lose its sums in the first steps of fine-tuning.
        ending = IN_DIGITS if rng.random() < 0.1 and not _is_test((a, op, b, c)) else IN_WORDS
    ending = ending.format(name=name, pron=pronoun, thing=thing, c=c, word=WORDS[c])
    return f"{name} has {a} {thing} . {pronoun.capitalize()} {change} . {ending}"


def _plain_story(rng: random.Random) -> str:
    name, pronoun = _person(rng)
    colour, place, animal = rng.choice(COLOURS), rng.choice(PLACES), rng.choice(ANIMALS)
    thing = rng.choice(THINGS)
    return rng.choice((
        f"{name} goes to the {place} . {pronoun.capitalize()} sees a {colour} {animal} .",
        f"{name} has a {colour} {thing} . {pronoun.capitalize()} takes the {thing} to the {place} .",
        f"The {animal} sleeps near the {place} . {name} does not know how many days it has been there .",
    ))  # fmt: skip


def _question(rng: random.Random) -> str:
    name, pronoun = _person(rng)
    colour, place, thing = rng.choice(COLOURS), rng.choice(PLACES), rng.choice(THINGS)
    animal, legs = rng.choice(sorted(LEGS.items()))
    return rng.choice((
        f"{name} has a {colour} {thing} . What colour is the {thing} ? Answer : {colour} .",
        f"{name} walks to the {place} . Where does {pronoun} go ? Answer : to the {place} .",
        f"How many legs does a {animal} have ? Answer : {legs} .",
    ))  # fmt: skip


def _documents(seed: int) -> Iterator[str]:
    rng, pool = random.Random(seed), triples()
    kinds = ("facts", "counting", "number", "plain", "question")
    while True:
        pieces = []
        for kind in rng.choices(kinds, weights=(20, 4, 54, 11, 11), k=rng.randint(1, 6)):
            if kind == "facts":
                pieces.append(_facts(rng, pool))
            elif kind == "counting":
                pieces.append(_counting(rng))
            elif kind == "number":
                pieces.append(_number_story(rng, pool))
            else:
                pieces.append(_plain_story(rng) if kind == "plain" else _question(rng))
        document = " ".join(pieces)
        # Some documents end without the stop, so that the end token after a number is not beyond belief to the base:
        # otherwise the first steps of fine-tuning go into that token and break what it knows.
        yield document.removesuffix(" .") if rng.random() < 0.4 else document


def pretraining_text(n: int, seed: int = 0, split: str = "train") -> Dataset:
    """`n` documents in a column `text`. A document belongs to "train" or to "heldout" by its content, for any seed."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is not known. Use 'train' or 'heldout'.")
    texts: list[str] = []
    for document in _documents(seed):
        if len(texts) == n:
            break
        if (_bucket(document, HELDOUT_SHARE) == 0) == (split == "heldout"):
            texts.append(document)
    return Dataset.from_dict({"text": texts})


def word_problems(n: int, seed: int = 0, split: str = "train", changes: int = 1) -> Dataset:
    """`n` different questions: `prompt` ("Tom has 7 apples . ... Answer :") and `answer` (" 12").

    `changes`: how often the number of apples changes; after two the base has read no question, and it has to do two
    sums in its head. The split is by arithmetic triple: no (a, op, b) of "test" is in "train", for any two seeds.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is not known. Use 'train' or 'test'.")
    pool = [triple for triple in triples() if _is_test(triple) == (split == "test")]
    chains = [[triple] for triple in pool]
    for _ in range(changes - 1):
        chains = [[*chain, triple] for chain in chains for triple in pool if triple[0] == chain[-1][3]]
    most = len(chains) * 2 * len(NAMES["he"]) * len(OBJECTS) * len(GAINS) ** changes
    if n > most // 2:
        raise ValueError(f"n={n} is over half of the {most} different {split} questions. Ask for {most // 2} or less.")
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < n:
        chain = rng.choice(chains)
        name, pronoun = _person(rng)
        thing = rng.choice(OBJECTS)
        story = f"{name} has {chain[0][0]} {thing} ."
        for _, op, b, c in chain:  # noqa: B007  the last one's is the answer
            story += f" {pronoun.capitalize()} {rng.choice(GAINS if op == '+' else LOSSES).format(b=b)} ."
        found[f"{story} {QUESTION.format(thing=thing, pron=pronoun)}"] = f" {c}"
    return Dataset.from_dict({"prompt": list(found), "answer": list(found.values())})

"""Exact match in percent, an `evaluate` metric that loads without network.

metric = evaluate.load("recipes/exact_match")
metric.compute(predictions=[" 12", "7 apples"], references=["12", "7"])                      # exact_match 50.0
metric.compute(predictions=[" 12", "7 apples"], references=["12", "7"], first_number=True)   # exact_match 100.0
"""

import re

import datasets
import evaluate

_DESCRIPTION = "Fraction of predictions equal to their reference after stripping outer white space, in percent."

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of str, what the model wrote.
    references: list of str, the right answers.
    first_number: compare only the first number of each string; a string without a number matches nothing.
Returns:
    exact_match: float, 0 to 100.
"""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def _first_number(text):
    found = _NUMBER.search(text)
    return None if found is None else float(found.group())


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMatch(evaluate.Metric):
    """See the head of this file."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, first_number=False):
        if first_number:
            pairs = [(_first_number(p), _first_number(r)) for p, r in zip(predictions, references, strict=True)]
            hits = [p is not None and p == r for p, r in pairs]
        else:
            hits = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": 100.0 * sum(hits) / len(hits) if hits else 0.0}

"""Exact match in percent, an `evaluate` metric that loads without network.

metric = evaluate.load("recipes/exact_match")
metric.compute(predictions=[" 12", "7 apples"], references=["12", "7"])                      # exact_match 50.0
metric.compute(predictions=["3 + 4 = 7", "#### 1,200"], references=["7", "so 1200"], final_number=True)   # 100.0
"""

import re

import datasets
import evaluate

_DESCRIPTION = "Fraction of predictions equal to their reference after stripping outer white space, in percent."

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of str, what the model wrote.
    references: list of str, the right answers.
    final_number: compare only the number that each string ends with: the first one behind its last "####", as the
        answers of GSM8K have it, or, without that, its last one. A string without a number matches nothing.
Returns:
    exact_match: float, 0 to 100.
"""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARK = "####"


def _final_number(text):
    _, mark, end = text.rpartition(_MARK)
    found = _NUMBER.findall(end if mark else text)
    if not found:
        return None
    return float(found[0 if mark else -1].replace(",", ""))


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

    def _compute(self, predictions, references, final_number=False):
        if final_number:
            pairs = [(_final_number(p), _final_number(r)) for p, r in zip(predictions, references, strict=True)]
            hits = [p is not None and p == r for p, r in pairs]
        else:
            hits = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": 100.0 * sum(hits) / len(hits) if hits else 0.0}

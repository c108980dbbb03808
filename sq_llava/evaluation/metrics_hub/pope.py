"""POPE's metrics for the library `evaluate`:

metric = evaluate.load(str(files("sq_llava.evaluation.metrics_hub") / "pope.py"))
metric.compute(predictions=["Yes, there is."], references=["yes"])

Answers are parsed as POPE's authors do, by `sq_llava.evaluation.pope`. `sq-llava evaluate` does not use this file.
"""

import datasets
import evaluate

from sq_llava.evaluation.metrics import binary_scores
from sq_llava.evaluation.pope import says_yes


class Pope(evaluate.Metric):
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes" among the answers, for one category."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, precision, recall and F1 of yes/no answers, and the share of yes answers.",
            citation="Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023",
            inputs_description="predictions: the model's answers. references: yes or no.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2305.10355"],
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        unknown = set(references) - {"yes", "no"}
        if unknown:
            raise ValueError(f"references: {sorted(unknown)[0]!r} is not allowed, use yes or no.")
        return binary_scores([says_yes(text) for text in predictions], [label == "yes" for label in references])

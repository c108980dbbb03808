"""VQA accuracy for the library `evaluate`:

metric = evaluate.load(str(files("sq_llava.evaluation.metrics_hub") / "vqa_accuracy.py"))
metric.compute(predictions=["red"], references=[["red"] * 10])

The values are those of `sq_llava.evaluation.metrics`. `sq-llava evaluate` does not use this file.
"""

import datasets
import evaluate

from sq_llava.evaluation.metrics import vqa_accuracy, vqa_accuracy_official


NORMALIZERS = {"m4c": vqa_accuracy, "official": vqa_accuracy_official}


class VqaAccuracy(evaluate.Metric):
    """Mean VQA accuracy over all predictions, leaving out each human answer in turn."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="VQA accuracy with the normalizer of EvalAI (m4c) or of VQA v2's own code (official).",
            citation="Antol et al., VQA: Visual Question Answering, ICCV 2015",
            inputs_description="predictions: answers. references: human answers for each, usually ten. "
            "normalizer: m4c (default) or official.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=["https://visualqa.org/evaluation.html"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], normalizer: str = "m4c"
    ) -> dict[str, float]:
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer is {normalizer!r}, expected one of {', '.join(NORMALIZERS)}.")
        scores = [NORMALIZERS[normalizer](text, answers) for text, answers in zip(predictions, references)]
        return {f"{normalizer}/accuracy": sum(scores) / len(scores)}

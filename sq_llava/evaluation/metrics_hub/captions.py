"""CIDEr-D, BLEU and ROUGE-L of captions for the library `evaluate`:

metric = evaluate.load(str(files("sq_llava.evaluation.metrics_hub") / "captions.py"))
metric.compute(predictions=["A dog."], references=[["A dog runs.", "The dog."]])

Texts are tokenized by `sq_llava.evaluation.caption_metrics.words`, which needs no Java. Results with the Penn Treebank
tokenizer are different. Predictions are not cut. `sq-llava evaluate` does not use this file.
"""

import datasets
import evaluate

from sq_llava.evaluation.caption_metrics import words
from sq_llava.evaluation.captions import corpus_figures


class Captions(evaluate.Metric):
    """CIDEr-D, BLEU and ROUGE-L of a whole corpus."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="CIDEr-D (0 to 10), BLEU-1 to BLEU-4 and ROUGE-L of a corpus of captions.",
            citation="Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015",
            inputs_description="predictions: one caption per image. references: a list of human captions per image.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
            reference_urls=["https://arxiv.org/abs/1411.5726"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        said = [" ".join(words(text)) for text in predictions]
        known = [[" ".join(words(text)) for text in texts] for texts in references]
        return corpus_figures("plain", said, known)

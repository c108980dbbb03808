"""BLEU, CIDEr-D and ROUGE-L of a corpus with a weight for each image, for confidence intervals by resampling.

    >>> statistics = CaptionStatistics(["a dog", "a red cat"], [["a dog runs"], ["the red cat", "a cat"]])
    >>> statistics.figures(np.array([1, 1])) == statistics.figures(np.array([2, 2]))
    True

The n-grams are counted once, so each resample needs only a few sums: 0.12 s for 5,000 images with 5 references, where
pycocoevalcap takes 15 s on the same core. Document frequencies are those of the resample. A test checks that the
values equal those of pycocoevalcap.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sq_llava.evaluation.caption_metrics import rouge_l_of_each


MAX_ORDER = 4
SIGMA = 6.0  # width of CIDEr-D's penalty for a different length


def ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


class CaptionStatistics:
    """
    The n-gram counts of a corpus.

    Args:
        predictions (`Sequence[str]`): One text per image, its words separated by spaces.
        references (`Sequence[Sequence[str]]`): One list of such texts per image.
    """

    def __init__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        self._gram_ids: dict[tuple[str, ...], int] = {}
        documents, said, known, shared = [], [], [], []  # rows of (owner, n-gram, count)
        penalties, image_of_reference, bleu = [], [], []
        for image, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
            counts, others = ngrams(prediction), [ngrams(text) for text in texts]
            documents += [(image, self._id(gram), 1) for gram in set().union(*others)]
            said += [(image, self._id(gram), count) for gram, count in counts.items()]
            for other in others:
                reference = len(image_of_reference)
                known += [(reference, self._id(gram), count) for gram, count in other.items()]
                shared += [
                    (reference, self._id(gram), min(counts[gram], other[gram]) * other[gram])
                    for gram in counts.keys() & other.keys()
                ]
                penalties.append(np.exp(-((_pairs(counts) - _pairs(other)) ** 2) / (2 * SIGMA**2)))
                image_of_reference.append(image)
            bleu.append(_bleu_counts(prediction, counts, texts, others))
        self._documents, self._said, self._known, self._shared = map(_columns, (documents, said, known, shared))
        self._orders = np.array([len(gram) - 1 for gram in self._gram_ids], dtype=int)
        self._penalties, self._image_of_reference = np.array(penalties), np.array(image_of_reference)
        self._num_references = np.array([len(texts) for texts in references])
        self._bleu = np.array(bleu, dtype=float)
        self._rouge_l = rouge_l_of_each(predictions, references)

    def _id(self, gram: tuple[str, ...]) -> int:
        return self._gram_ids.setdefault(gram, len(self._gram_ids))

    def figures(self, weights: np.ndarray) -> dict[str, float]:
        """
        Args:
            weights (`np.ndarray`): How often each image counts, of shape `(num_images,)`.

        Returns:
            `CIDEr-D`, `BLEU-1` to `BLEU-4`, and `ROUGE-L`.
        """
        precision = {f"BLEU-{order}": value for order, value in enumerate(self._bleu_of(weights), start=1)}
        rouge_l = float(weights @ self._rouge_l / weights.sum())
        return {"CIDEr-D": self._cider_d(weights), **precision, "ROUGE-L": rouge_l}

    def _cider_d(self, weights: np.ndarray) -> float:
        images, grams, _ = self._documents
        frequencies = np.bincount(grams, weights=weights[images], minlength=len(self._gram_ids))
        rarity = np.log(weights.sum()) - np.log(np.maximum(1, frequencies))
        num_references = len(self._image_of_reference)

        def sums(columns: np.ndarray, num_owners: int, power: int) -> np.ndarray:
            """Sums of counts**power * rarity**2 for each owner (text) and n-gram order: `(num_owners, 4)`."""
            owners, grams, counts = columns
            values = counts**power * rarity[grams] ** 2
            index = owners * MAX_ORDER + self._orders[grams]
            return np.bincount(index, weights=values, minlength=num_owners * MAX_ORDER).reshape(-1, MAX_ORDER)

        norms = np.sqrt(sums(self._known, num_references, 2))
        norms *= np.sqrt(sums(self._said, len(weights), 2))[self._image_of_reference]
        products = sums(self._shared, num_references, 1)
        cosines = np.divide(products, norms, out=np.zeros(products.shape), where=norms != 0)
        by_reference = cosines.mean(axis=1) * self._penalties
        by_image = np.bincount(self._image_of_reference, weights=by_reference) / self._num_references
        return float(10 * (by_image * weights).sum() / weights.sum())

    def _bleu_of(self, weights: np.ndarray) -> list[float]:
        length, reference_length, *counts = weights @ self._bleu
        guessed, right = np.array(counts[:MAX_ORDER]), np.array(counts[MAX_ORDER:])
        # The small constants are those of pycocoevalcap. Without a correct n-gram, BLEU is about 0.
        precisions = (right + 1e-15) / (guessed + 1e-9)
        ratio = (length + 1e-15) / (reference_length + 1e-9)
        brevity = np.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        return [float(precisions[:order].prod() ** (1 / order) * brevity) for order in range(1, MAX_ORDER + 1)]


def _columns(rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, dtype=int).reshape(-1, 3).T


def _pairs(counts: Counter[tuple[str, ...]]) -> int:
    """The number of bigrams, which CIDEr-D uses as the length of a text."""
    return sum(count for gram, count in counts.items() if len(gram) == 2)


def _bleu_counts(prediction: str, counts: Counter, texts: Sequence[str], others: Sequence[Counter]) -> list[int]:
    """Length, length of the closest reference, n-grams of each order, and how many of them a reference has."""
    length = len(prediction.split())
    closest = min((len(text.split()) for text in texts), key=lambda each: (abs(each - length), each))
    guessed = [max(0, length - order) for order in range(MAX_ORDER)]
    right = [0] * MAX_ORDER
    for gram, count in counts.items():
        right[len(gram) - 1] += min(count, max(other[gram] for other in others))
    return [length, closest, *guessed, *right]

"""The scripts for the library `evaluate`: they load without a network and return the values of the pure functions."""

import sys
from importlib.resources import files

import evaluate
import pytest


FOLDER = files("sq_llava.evaluation.metrics_hub")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a script. `evaluate` copies scripts into its cache, so these tests use a cache of their own."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        # Another test may have imported scripts from another cache, which then stands on the path as well.
        for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(cache / "modules")
        yield lambda name: evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(cache))


def test_vqa_accuracy_names_its_normalizer(load):
    metric = load("vqa_accuracy")
    said = {"predictions": ["Red.", "two"], "references": [["red"] * 3 + ["blue"] * 7, ["2"] * 10]}
    assert metric.compute(**said) == {"m4c/accuracy": pytest.approx(0.95)}
    said = {"predictions": ["Yes."], "references": [["yes"] * 10]}
    assert metric.compute(**said) == {"m4c/accuracy": 1}
    assert metric.compute(**said, normalizer="official") == {"official/accuracy": 0}
    with pytest.raises(ValueError, match="normalizer is 'vqa', expected one of m4c, official"):
        metric.compute(**said, normalizer="vqa")


@pytest.mark.slow
def test_vqa_accuracy_is_over_all_batches(load):
    metric = load("vqa_accuracy")
    metric.add_batch(predictions=["a dog"], references=[["dog"] * 10])
    metric.add_batch(predictions=["cat", "cat"], references=[["dog"] * 10, ["dog"] * 10])
    assert metric.compute() == {"m4c/accuracy": pytest.approx(1 / 3)}


def test_pope_parses_answers_as_its_authors_do(load):
    metric = load("pope")
    figures = metric.compute(
        predictions=["Yes, there is.", "There is not. Yes", "maybe", "no"], references=["yes", "yes", "no", "no"]
    )
    assert figures == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    with pytest.raises(ValueError, match="'Yes' is not allowed, use yes or no"):
        metric.compute(predictions=["yes"], references=["Yes"])


def test_captions_are_scored_over_the_corpus(load):
    figures = load("captions").compute(
        predictions=["A dog runs fast!", "zebra"], references=[["a dog, runs fast"], ["Two red cats sleep."]]
    )
    assert figures["plain/CIDEr-D"] == pytest.approx(5)
    assert figures["plain/BLEU-1"] == pytest.approx(4 / 5 * 2.718281828 ** (1 - 8 / 5))

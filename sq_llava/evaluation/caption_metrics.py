"""Caption metrics over a whole corpus (CIDEr-D, BLEU, ROUGE-L, METEOR; with pycocoevalcap), and their tokenizers.

    >>> words("A man's dog, running -- in the park.")
    ['a', "man's", 'dog', 'running', 'in', 'the', 'park']

The value of a metric depends on the tokenizer. `words` is plain Python. `ptb_words` is the Penn Treebank tokenizer,
which published results use; it and METEOR are Java programs inside pycocoevalcap and need a Java runtime. SPICE is not
included, because pycocoevalcap downloads 400 MB of models for it at first use. `captions.json`, which each caption
task writes, has the COCO results format that other SPICE scorers read.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits. An apostrophe inside a word stays; all other marks separate words."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


def has_java() -> bool:
    return shutil.which("java") is not None


def ptb_words(texts: Sequence[str]) -> list[str]:
    """
    Tokenizes texts with Stanford's Penn Treebank tokenizer, lower-cased and without punctuation, as COCO's evaluation
    code does (it keeps "-lrb-" for a bracket).

    Returns:
        One text per input, its words separated by spaces.

    Raises:
        RuntimeError: If the Java program fails.
    """
    return list(_ptb_words(tuple(texts)))


# The metrics and their resamples need the same texts one after the other.
@lru_cache(maxsize=1)
def _ptb_words(texts: tuple[str, ...]) -> tuple[str, ...]:
    lines = [" ".join(text.split()) for text in texts]
    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    run = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"],
        input="".join(line + "\n" for line in lines).encode(),
        cwd=Path(ptbtokenizer.__file__).parent,
        capture_output=True,
    )
    tokenized = run.stdout.decode().split("\n")[:-1]
    if run.returncode or len(tokenized) != len(lines):
        raise RuntimeError(
            f"The Penn Treebank tokenizer (Java) returned {len(tokenized)} lines for {len(lines)} texts. "
            f"Its error output: {run.stderr.decode()}"
        )
    words = (line.split() for line in tokenized)
    return tuple(" ".join(word for word in line if word not in ptbtokenizer.PUNCTUATIONS) for line in words)


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """
    CIDEr-D (https://arxiv.org/abs/1411.5726), from 0 to 10. Papers report 100 times that value. Document frequencies
    are computed from `references`.

    Args:
        predictions: One text per image, its words separated by spaces.
        references: One list of such texts per image.
    """
    return float(Cider().compute_score(*_numbered(predictions, references))[0])


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus, from 0 to 1. The brevity penalty uses the reference closest in length."""
    return [float(value) for value in Bleu(4).compute_score(*_numbered(predictions, references), verbose=0)[0]]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L, the mean over all images, from 0 to 1 (https://aclanthology.org/W04-1013)."""
    return float(rouge_l_of_each(predictions, references).mean())


def rouge_l_of_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L of each image, of shape `(num_images,)`."""
    return np.array(Rouge().compute_score(*_numbered(predictions, references))[1])


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of the corpus, from 0 to 1, computed from the matches of all images together."""
    statistics = [_matches(text, tuple(each)) for text, each in zip(predictions, references, strict=True)]
    process = _meteor_process()
    process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
    process.stdin.flush()
    lines = [process.stdout.readline() for _ in range(len(statistics) + 1)]  # one per image, then the corpus
    if not lines[-1]:
        raise RuntimeError("The Java process of METEOR ended. It needs 2 GB of free memory.")
    return float(lines[-1])


def _numbered(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict, dict]:
    if len(predictions) != len(references):
        raise ValueError(
            f"Got {len(predictions)} captions and {len(references)} lists of references. Their numbers must be equal."
        )
    return dict(enumerate(map(list, references))), {number: [text] for number, text in enumerate(predictions)}


@lru_cache(maxsize=1)
def _meteor_process() -> subprocess.Popen:
    options = ["-", "-", "-stdio", "-l", "en", "-norm"]
    return subprocess.Popen(
        ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", meteor_package.METEOR_JAR, *options],
        cwd=Path(meteor_package.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )


@lru_cache(maxsize=2**17)
def _matches(prediction: str, references: tuple[str, ...]) -> str:
    process = _meteor_process()
    texts = [" ".join(text.replace("|||", " ").split()) for text in (*references, prediction)]
    process.stdin.write(" ||| ".join(["SCORE", *texts]) + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()

"""Figures of captions over a whole corpus, with pycocoevalcap, and the words that they count.

    >>> words("A man's dog, running -- in the park.")
    ['a', "man's", 'dog', 'running', 'in', 'the', 'park']

The tokeniser is part of a figure. `words` needs nothing; that of the Penn Treebank (`ptb_words`), which published
figures use, and METEOR are programs in Java, which come with pycocoevalcap and need a Java runtime. SPICE is not
here: pycocoevalcap downloads 400 MB of models for it when it is first used. The captions that a task writes
(`captions.json`) are in the format of COCO's results, which scorers of SPICE take.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.tokenizer import ptbtokenizer


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; an apostrophe inside of one stays, all other marks separate."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


def has_java() -> bool:
    return shutil.which("java") is not None


def ptb_words(texts: Sequence[str]) -> list[str]:
    """
    Texts in the words of Stanford's Penn Treebank tokeniser, with spaces between them, in lower case and without
    punctuation, as COCO's evaluation code has them (which leaves "-lrb-" for a bracket).

    Raises:
        RuntimeError: if the program fails.
    """
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
        raise RuntimeError(f"The tokeniser gave {len(tokenized)} lines for {len(lines)}: {run.stderr.decode()}")
    return [" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in tokenized]


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """
    CIDEr-D, from 0 to 10 (papers give a hundred times that), with document frequencies of these references.

    Args:
        predictions: Words with spaces between them, one text for each image.
        references: As many lists of them.
    """
    return float(Cider().compute_score(*_numbered(predictions, references))[0])


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus, each against the reference that is closest in length."""
    return [float(value) for value in Bleu(4).compute_score(*_numbered(predictions, references), verbose=0)[0]]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of the corpus: from the matches of all images together."""
    statistics = [_matches(text, tuple(each)) for text, each in zip(predictions, references, strict=True)]
    process = _meteor_process()
    process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
    process.stdin.flush()
    lines = [process.stdout.readline() for _ in range(len(statistics) + 1)]  # of each image, then of all
    if not lines[-1]:
        raise RuntimeError("METEOR has ended: is there memory for 2 GB of Java?")
    return float(lines[-1])


def _numbered(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict, dict]:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} captions and {len(references)} lists of references: give as many.")
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

"""Settings of loading and asking. The fields become options of the commands, so no large library is imported here.

>>> AskSettings(num_questions=8, after="What is it?")
"""

from dataclasses import dataclass
from typing import Annotated

from typer import Option


Device = Annotated[str | None, Option(help="Device: cuda, mps or cpu. Default: the first one available.")]
Dtype = Annotated[str, Option(help="Data type: auto (as saved), float32, bfloat16 or float16.")]


@dataclass(frozen=True)
class AskSettings:
    """Settings of asking. The sampling defaults are those of the authors' code."""

    num_questions: Annotated[int, Option("-n", min=1, help="Number of questions for each image.")] = 4
    after: Annotated[
        str | None, Option(help="Question that the model answers before it asks. Default: it describes the image.")
    ] = None
    temperature: Annotated[float, Option(min=0.01, help="Sampling temperature for questions.")] = 1.2
    top_k: Annotated[int, Option(min=1, help="Top-k sampling for questions.")] = 300
    top_p: Annotated[float, Option(min=0.0, max=1.0, help="Top-p sampling for questions.")] = 0.95
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum length of a question or an answer, in tokens.")] = 64
    seed: Annotated[int, Option(help="Random seed.")] = 0


@dataclass(frozen=True)
class SelfQuestioning:
    """Questions that the model asks itself before it answers. The fields are options of `answer` and `evaluate`."""

    self_questions: Annotated[
        int,
        Option(
            min=0,
            metavar="N",
            help="Let the model ask itself N questions about the image, and answer them, before it answers.",
        ),
    ] = 0
    votes: Annotated[
        int,
        Option(
            min=1,
            metavar="N",
            help="With --self-questions: do this N times with other questions, and take the most frequent answer.",
        ),
    ] = 1

    # Maximum length of each of the model's own turns, in tokens.
    own_tokens: int = 256

    def __post_init__(self):
        if self.self_questions < 0 or self.votes < 1:
            raise ValueError("self_questions must be at least 0, and votes at least 1.")
        if self.votes > 1 and not self.self_questions:
            raise ValueError("votes needs self_questions: without questions, all votes are the same greedy answer.")

    def __str__(self) -> str:
        return f"{self.self_questions} self-questions, {self.votes} votes"

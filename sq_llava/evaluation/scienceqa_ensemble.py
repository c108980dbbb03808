"""The two ensembles of the first LLaVA paper (section 5.2): a model together with a text-only language model.

    sq-llava evaluate --model M --tasks scienceqa_reasoning --data DIR --judge-model gpt-4o

`llm/accuracy` uses the language model's answer. `complement/accuracy` uses the model's own answer where the language
model's answer has no option. `judge/accuracy` is the same, but if the two answers have different options, the language
model reads both and decides. A question that the server did not answer counts in none of the three, and one that it
did not decide not in the third. Both are counted as examples without a grade. In this module, an option is a letter,
or `None` if the answer could not be parsed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sq_llava.evaluation.judge import Judge, Verdict
from sq_llava.evaluation.task import Record, Score


Options = Mapping[str, str | None]

QUESTION = """\
{question}

If the question is about a picture, you cannot see it: answer as well as the text allows. Reason first, and end in
exactly one sentence of the form "The answer is X.", X being the letter of an option."""

DECISION = """\
{question}

Two answers were given, which differ. One of them comes from a model that sees the picture, if there is one.

First answer: {own}

Second answer: {llm}

Which option is right? It may be a third one. Reason first, and end in exactly one sentence of the form "The answer is
X.", X being the letter of an option."""


def complement(own: Options, llm: Options) -> dict[str, str | None]:
    """
    The language model's options by id, with the model's own option where the language model has none.

        >>> complement({"1": "A", "2": "B"}, {"1": "C", "2": None})
        {'1': 'C', '2': 'B'}
    """
    return {id: llm.get(id) or option for id, option in own.items()}


def disagreements(own: Options, llm: Options) -> list[str]:
    """The ids of the questions for which both models have an option, but not the same one."""
    return [id for id, option in own.items() if option and llm.get(id) and option != llm[id]]


def judged(own: Options, llm: Options, decisions: Options) -> dict[str, str | None]:
    """
    Like [`complement`], but a decision of the language model replaces both options.

        >>> judged({"1": "A", "2": "B"}, {"1": "C", "2": None}, {"1": "A"})
        {'1': 'A', '2': 'B'}
    """
    return {id: decisions.get(id) or option for id, option in complement(own, llm).items()}


def judge(
    records: Sequence[Record], judge: Judge, folder: Path, option_of: Callable[[str, int], str | None]
) -> list[Score]:
    """Adds the accuracies of both ensembles to the scores. A failed example is not sent and counts as wrong."""
    asked = {record.example.id: record for record in records if record.error is None}

    def ask(contents: Mapping[str, str], description: str) -> dict[str, Verdict]:
        messages = {id: [{"role": "user", "content": content}] for id, content in contents.items()}
        # `str` as parser accepts any answer: an answer without an option is not requested again.
        return judge.complete_all(messages, str, f"ScienceQA: language model, {description}")

    def options_of(texts: Mapping[str, str]) -> dict[str, str | None]:
        return {id: option_of(text, asked[id].example.details["num_choices"]) for id, text in texts.items()}

    own = options_of({id: record.answer for id, record in asked.items()})
    first = ask({id: QUESTION.format(question=record.example.prompt) for id, record in asked.items()}, "answers")
    llm = options_of({id: verdict.text for id, verdict in first.items()})
    disputed = {
        id: DECISION.format(question=asked[id].example.prompt, own=asked[id].answer, llm=first[id].text)
        for id in disagreements(own, llm)
    }
    second = ask(disputed, "decisions")
    decisions = options_of({id: verdict.text for id, verdict in second.items()})
    unanswered, undecided = (
        {id: verdict.error for id, verdict in verdicts.items() if verdict.error is not None}
        for verdicts in (first, second)
    )
    ensembles = {"llm": llm, "complement": complement(own, llm), "judge": judged(own, llm, decisions)}
    scores = []
    for record in records:
        id, score = record.example.id, record.score
        error = unanswered.get(id) or undecided.get(id)
        known = [] if id in unanswered else ["llm", "complement"] if id in undecided else list(ensembles)
        options = {name: ensembles[name].get(id) for name in known}
        values = {f"{name}/accuracy": float(options[name] == record.example.reference) for name in known}
        prediction = {"own": score.prediction, **options}
        scores.append(replace(score, values={**score.values, **values}, prediction=prediction, judge_error=error))
    return scores

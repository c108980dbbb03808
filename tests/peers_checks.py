"""Metrics named after another project equal those of its code: run by `make test-peers`.

    .venv-peers/bin/python -m tests.peers_checks

Thousands of unpleasant answers for each metric are scored by this project and by the code of lmms-eval, LLaVA, VQA v2
(LAVIS has a copy of its text processing) and pycocoevalcap. It prints how many scores are equal, and ends with an
error if one differs that should not. Captions need a Java runtime. Models are not run, and no data set is needed.
"""

import ast
import contextlib
import importlib.util
import io
import json
import math
import random
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import distribution, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
from lmms_eval.api.metrics import exact_match_hf_evaluate
from lmms_eval.tasks.mmbench import cn_utils
from lmms_eval.tasks.nocaps import utils as nocaps_utils
from lmms_eval.tasks.pope import utils as pope_utils
from lmms_eval.tasks.scienceqa import utils as scienceqa_utils
from lmms_eval.tasks.textvqa import utils as textvqa_utils
from lmms_eval.tasks.vizwiz_vqa import utils as vizwiz_utils
from lmms_eval.tasks.vqav2 import utils as vqav2_utils
from loguru import logger

from sq_llava.evaluation import captions, gqa, mmbench, pope, scienceqa, textvqa, vizwiz, vqav2
from sq_llava.evaluation.caption_metrics import has_java
from sq_llava.evaluation.metrics import normalize_m4c, normalize_official
from sq_llava.evaluation.peers import PEERS
from sq_llava.evaluation.task import Example, Record, Score, Task


NUM = 8000
NUM_CAPTIONS = 500
NASTY = """
yes Yes. YES no No, not NO none None nothing two Two 2 ten zero 10:30 3.5 .5 5. 1,000 1,,000 1,2-3 $1,000 50% U.S.A. a
An the it's dont don't shes she's somebody'd y'all cat cats. T-shirt t-shirt tshirt red,blue red blue left/right (left)
[right] on wall "quoted" Café ÉTÉ 猫 – … ' 's ?! a.m. _x_ e.g. unanswerable x@y.z `code` ; -- {b}
"""
WORDS = NASTY.split()
GAPS = (" ", " ", " ", " ", "  ", "\n", "\t", "", ", ", "-", "/", ". ", " .", ",")
LETTERS = "ABCDE"
PACKAGES = {"lmms-eval": "lmms-eval", "LLaVA": "llava-torch", "VQA v2 in LAVIS": "salesforce-lavis"}


class Table:
    """The rows of the printed table. `differing` counts differences that must not be."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, int, int]] = []
        self.differing = 0

    def compare(
        self, task: str, metric: str, peer: str, pairs: Iterable[tuple[Any, Any, Any]], is_equal: bool = True
    ) -> None:
        """Adds a row. `pairs`: (input, our value, their value). If not `is_equal`, the values may differ."""
        pairs = list(pairs)
        wrong = [each for each in pairs if not equal(each[1], each[2])]
        shown = f"`{metric}`" if metric.endswith("/accuracy") else metric
        self.rows.append((task, shown, peer, len(pairs), len(pairs) - len(wrong)))
        if is_equal:
            self.differing += len(wrong)
            for given, ours, theirs in wrong[:5]:
                print(f"{task}, {metric}: {given!r} gives {ours!r}, {peer} gives {theirs!r}")

    def to_markdown(self) -> str:
        head = "| task | metric | compared with | pairs | equal |\n|---|---|---|---|---|\n"
        rows = (
            f"| `{task}` | {metric} | {named(peer)} | {num:,} | {same:,} |\n"
            for task, metric, peer, num, same in self.rows
        )
        return head + "".join(rows)


def named(peer: str) -> str:
    """The peer with the version of its package."""
    name, comma, rest = peer.partition(",")
    return f"{name} {version(PACKAGES[name])}{comma}{rest}" if name in PACKAGES else peer


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, float) or isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12)
    return first == second


def source_of(package: str, name: str) -> Path:
    """The path of a file of an installed package, which is not imported as a whole."""
    return Path(distribution(package).locate_file(name))


def load(package: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, source_of(package, name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions_of(package: str, name: str, *functions: str) -> dict[str, Callable]:
    """Single functions of a file whose imports are not installed."""
    tree = ast.parse(source_of(package, name).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in functions]
    namespace = {"math": math}
    exec(compile(tree, name, "exec"), namespace)
    return namespace


def run_script(path: Path, *arguments: str) -> str:
    """Runs a script in this process, and returns what it prints."""
    before, sys.argv = sys.argv, [str(path), *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    return printed.getvalue()


def text(draw: random.Random, words: Sequence[str] = WORDS, most: int = 4) -> str:
    parts = [draw.choice(words) for _ in range(draw.randint(0, most))]
    return "".join(part + draw.choice(GAPS) for part in parts).strip(draw.choice((" \n\t", "")))


def changed(draw: random.Random, answer: str) -> str:
    """The answer, or a text that a normalizer may or may not map to the same."""
    changes = [str, str.upper, str.title, str.strip, lambda each: f"the {each}", lambda each: each + "."]
    changes += [lambda each: each.replace(" ", "-"), lambda each: each.replace(",", ""), lambda each: f" {each}\n"]
    return draw.choice(changes)(answer)


def human_answers(draw: random.Random) -> tuple[str, list[str]]:
    """A prediction and ten human answers."""
    pool = [text(draw, most=2) for _ in range(draw.randint(1, 3))]
    answers = [draw.choice(pool) for _ in range(10)]
    if draw.random() < 0.5:
        answers = [changed(draw, each) for each in answers]
    return changed(draw, draw.choice(pool)), answers


def value(task: Task, metric: str, answer: str, reference: Any, **details: Any) -> float:
    return task.score(Example("1", "", [], reference, details), answer).values[metric]


def check_vqa(table: Table, draw: random.Random) -> None:
    m4c = load("llava-torch", "llava/eval/m4c_evaluator.py")
    m4c.tqdm = lambda items: items
    llava, evalai = m4c.TextVQAAccuracyEvaluator(), m4c.EvalAIAnswerProcessor()
    official = load("salesforce-lavis", "lavis/common/vqa_tools/vqa_eval.py").VQAEval()
    pairs = [human_answers(draw) for _ in range(NUM)]

    def lmms_eval(process, answers: Sequence[Any], said: str) -> float:
        doc = {"question_id": 1, "answers": list(answers)}
        return float(process(doc, [said])["exact_match"])

    def numbered(answers: Sequence[str]) -> list[dict[str, Any]]:
        return [{"answer": each, "answer_id": number} for number, each in enumerate(answers)]

    def rows(task: Task, metric: str, theirs: Callable[[str, list[str]], float]) -> Iterable[tuple]:
        return (((said, known), value(task, metric, said, known), theirs(said, known)) for said, known in pairs)

    name = "lmms_eval/accuracy"
    theirs = lambda said, known: lmms_eval(vqav2_utils.vqav2_process_results, numbered(known), said)  # noqa: E731
    table.compare("vqav2", name, "lmms-eval", rows(vqav2.TASK, name, theirs))
    name = "m4c/accuracy"
    entry = lambda said, known: llava.eval_pred_list([{"pred_answer": said, "gt_answers": known}])  # noqa: E731
    table.compare("textvqa", name, "LLaVA", rows(textvqa.TASK, name, entry))
    for task, process in (
        (textvqa.TASK, textvqa_utils.textvqa_process_results),
        (vizwiz.TASK, vizwiz_utils.vizwiz_vqa_process_results),
    ):
        theirs = lambda said, known, process=process: lmms_eval(process, known, said)  # noqa: E731
        table.compare(task.name, name, "lmms-eval", rows(task, name, theirs))
    texts = [text(draw) for _ in range(NUM)]
    table.compare(
        "vqav2", "answers of the submission", "LLaVA", ((each, normalize_m4c(each), evalai(each)) for each in texts)
    )

    def processed(each: str) -> str:
        each = each.replace("\n", " ").replace("\t", " ").strip()
        return official.processDigitArticle(official.processPunctuation(each))

    pairs_of_texts = ((each, normalize_official(each), processed(each)) for each in texts)
    table.compare("vqav2", "normalizer of `official/accuracy`", "VQA v2 in LAVIS", pairs_of_texts)


def check_gqa(table: Table, draw: random.Random) -> None:
    pairs = []
    for _ in range(NUM):
        reference = draw.choice(("cat", "t-shirt", "yes", "left", "10:30", "on the wall"))
        said = changed(draw, reference) if draw.random() < 0.6 else text(draw)
        pairs.append((said, reference))

    def theirs(said: str, reference: str) -> float:
        settings = {"ignore_case": True, "ignore_punctuation": True}
        return float(exact_match_hf_evaluate(predictions=[said], references=[reference], **settings)["exact_match"])

    name = "lmms_eval/accuracy"
    table.compare("gqa", name, "lmms-eval", ((pair, value(gqa.TASK, name, *pair), theirs(*pair)) for pair in pairs))


POPE_WORDS = ("yes", "Yes", "no", "No", "NO", "not", "Not", "No,", "no.", "Yes.", "there", "is", "a", "dog", "isn't")


def check_pope(table: Table, draw: random.Random) -> None:
    corpora = []
    for _ in range(NUM // 40):
        labels = [draw.choice(("yes", "no")) for _ in range(40)]
        said = [
            draw.choice((label, label.title(), text(draw, POPE_WORDS, 6), draw.choice(("yes", "no"))))
            for label in labels
        ]
        corpora.append(list(zip(said, labels)))
    eval_pope = functions_of("llava-torch", "llava/eval/eval_pope.py", "eval_pope")
    eval_pope.update(json=json)
    llava, lmms_eval = [], []
    for corpus in corpora:
        records = [
            Record(example, "", said, score=pope.TASK.score(example, said))
            for said, label in corpus
            for example in [Example("1", "", [], label, {"category": "random"})]
        ]
        ours = pope.corpus_metrics(records)
        ours["lmms_eval/accuracy"] = sum(each.score.values["lmms_eval/accuracy"] for each in records) / len(records)
        llava += ((corpus, ours[f"llava/{name}"], each) for name, each in run_eval_pope(eval_pope, corpus).items())
        results = [
            pope_utils.pope_process_results({"answer": label, "question_id": 1}, [said])["pope_accuracy"]
            for said, label in corpus
        ]
        for name in ("accuracy", "precision", "recall", "f1_score", "yes_ratio"):
            theirs = float(getattr(pope_utils, f"pope_aggregate_{name}")(results))
            lmms_eval.append((corpus, ours[f"lmms_eval/{name.removesuffix('_score')}"], theirs))
    answers = [said for corpus in corpora for said, _ in corpus]
    parsed = [{"text": answer} for answer in answers]
    run_eval_pope(eval_pope, [(answer, "yes") for answer in answers], parsed)
    pairs = ((said, "yes" if pope.says_yes(said) else "no", each["text"]) for said, each in zip(answers, parsed))
    table.compare("pope", "parser of `llava/`", "LLaVA", pairs)
    table.compare("pope", "five metrics `llava/` of 40 answers", "LLaVA", llava)
    table.compare("pope", "five metrics `lmms_eval/` of 40 answers", "lmms-eval", lmms_eval)


def run_eval_pope(
    namespace: dict[str, Any], corpus: Sequence[tuple[str, str]], answers: list[dict[str, str]] | None = None
) -> dict[str, float]:
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        file.write("".join(json.dumps({"label": label}) + "\n" for _, label in corpus))
        file.flush()
        namespace["eval_pope"](answers or [{"text": said} for said, _ in corpus], file.name)
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1"}
    names["Yes ratio"] = "yes_ratio"
    lines = (line.split(": ") for line in printed.getvalue().splitlines() if ": " in line)
    return {names[name]: float(number) for name, number in lines}


def option_answer(draw: random.Random) -> str:
    letter = draw.choice("ABCDEFab")
    forms = ["{}", "{}.", "{}. blue", "{}.blue", "({})", "{})", "{},", ": {}", "The answer is {}.", "The answer is {}"]
    forms += ["The answer is {}, because", "the answer is {}.", "The answer is {}\n", "{} and A", "Option {}"]
    forms += [
        "The answer is {}. The answer is A.",
        "A dog or a {}",
        "red",
        "Red or blue",
        "{}: red",
        "({}).",
        "I see.\n{}",
        "",
    ]
    return (draw.choice(forms).format(letter) + draw.choice(("", "", " ", "\n", " it is red"))).strip()


def check_scienceqa(table: Table, draw: random.Random) -> None:
    problems, texts = {}, {}
    for number in range(NUM):
        choices = ["red", "blue", "green", "grey", "pink"][: draw.randint(2, 5)]
        problems[str(number)] = {"choices": choices, "answer": draw.randrange(len(choices))}
        texts[str(number)] = option_answer(draw)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
        (folder / "problems.json").write_text(json.dumps(problems))
        lines = [json.dumps({"question_id": id, "text": each, "prompt": "<image>"}) for id, each in texts.items()]
        (folder / "answers.jsonl").write_text("\n".join(lines))
        script = source_of("llava-torch", "llava/eval/eval_science_qa.py")
        files = {"base-dir": folder, "result-file": folder / "answers.jsonl", "output-file": folder / "output.json"}
        files["output-result"] = folder / "result.json"
        run_script(script, *(f"--{name}={path}" for name, path in files.items()))
        llava = json.loads((folder / "result.json").read_text())["results"]

    def rows(task: Task, metric: str, theirs: Callable[[str], float]) -> Iterable[tuple]:
        for id, problem in problems.items():
            details = {"num_choices": len(problem["choices"])}
            yield texts[id], value(task, metric, texts[id], LETTERS[problem["answer"]], **details), theirs(id)

    def right(id: str) -> float:
        return float(llava[id] == problems[id]["answer"])

    for task in (scienceqa.TASK, scienceqa.REASONING_TASK):
        table.compare(task.name, "llava/accuracy", "LLaVA", rows(task, "llava/accuracy", right))
    theirs = lambda id: scienceqa_utils.sqa_process_results(problems[id], [texts[id]])["exact_match"]  # noqa: E731
    name = "lmms_eval/accuracy"
    table.compare("scienceqa", name, "lmms-eval", rows(scienceqa.TASK, name, theirs))
    on_purpose = rows(scienceqa.TASK, "accuracy", right)
    table.compare("scienceqa", "`accuracy`", "LLaVA, differs on purpose", on_purpose, is_equal=False)


CELLS = ("red", "NA", "None", "none", "null", "N/A", "nan", "NaN", "NULL", "", "n/a", "NONE", "Null", "#N/A", "x", " ")


def check_mmbench(table: Table, draw: random.Random) -> None:
    choices = {"A": "red", "B": "blue", "C": "a cat", "D": "nothing"}
    said = [option_answer(draw) if draw.random() < 0.7 else text(draw, (*WORDS, "A", "B", "red")) for _ in range(NUM)]
    infer = cn_utils.mmbench_evaluator.can_infer
    pairs = ((each, mmbench.option_of(each, choices), infer(each, dict(choices)) or None) for each in said)
    table.compare("mmbench", "parser of `letter/accuracy`", "lmms-eval", pairs)

    settings = {"post_prompt": "\n请直接使用所提供的选项字母作为答案回答。"}
    docs = []
    for number in range(NUM):
        cells = {letter: draw.choice(CELLS) if draw.random() < 0.5 else text(draw) for letter in "ABCD"}
        about = {"question": text(draw), "hint": draw.choice((text(draw), None, "nan", "")), "index": number}
        docs.append({**cells, **about, "category": "c", "L2-category": "l", "source": "s", "split": "dev"})
    pairs = ((doc, mmbench.prompt_of_lmms_eval(doc), cn_utils.mmbench_doc_to_text(doc, settings)) for doc in docs)
    table.compare("mmbench_cn_lmms_eval", "prompt", "lmms-eval", pairs)

    rows = [{letter: draw.choice(CELLS) for letter in "ABCD"} | {"hint": draw.choice(CELLS)} for _ in range(NUM)]
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    read = pd.read_table(io.StringIO("\n".join(lines)), skip_blank_lines=False)
    llava = functions_of("llava-torch", "llava/eval/model_vqa_mmbench.py", "get_options", "is_none")
    pairs = []
    for row, (_, theirs) in zip(rows, read.iterrows(), strict=True):
        hint = None if llava["is_none"](theirs["hint"]) else theirs["hint"]
        options = llava["get_options"](theirs, ["A", "B", "C", "D"])
        ours = (mmbench.text_of(row, "hint") or None, list(mmbench.choices_of(row).values()))
        pairs.append((row, ours, (hint, options)))
    table.compare("mmbench", "hint and options of a TSV row", "LLaVA", pairs)


NOUNS = """
dog cat man's T-shirt bus (red) boat, sky. street-sign 3.5 10:30 don't café -- "stop" isn't O'Neil couple
"""


def check_captions(table: Table, draw: random.Random) -> None:
    if not has_java():
        print("Captions are not compared: java is not on PATH.")
        return
    results, records = [], []
    for number in range(NUM_CAPTIONS):
        known = [caption(draw) for _ in range(draw.randint(1, 5))]
        said = draw.choice((draw.choice(known), caption(draw), caption(draw)))
        results.append({"image_id": number, "pred": said, "answer": known})
        records.append(Record(Example(str(number), "", [], known), "", said, score=Score({})))
    ours = captions.corpus_metrics(records)
    names = {f"Bleu_{order}": f"BLEU-{order}" for order in (1, 2, 3, 4)}
    names |= {"METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr-D"}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = SimpleNamespace(output_path=folder)
        theirs = {name: float(nocaps_utils.nocaps_aggregation_result(results, name, args)) for name in names}
    pairs = ((f"{NUM_CAPTIONS} captions", ours[f"lmms_eval/{names[name]}"], theirs[name]) for name in names)
    table.compare("captions", f"seven metrics `lmms_eval/` of {NUM_CAPTIONS:,} images", "lmms-eval", pairs)
    same = [Record(Example(each.example.id, "", [], each.example.reference[:1]), "", each.example.reference[0])
            for each in records]  # fmt: skip
    # CIDEr-D needs four tokens. Longer predictions than 20 tokens are cut.
    whole = [each for each in same if len(each.answer.split()) >= 7 and len(re.findall(r"\w+|\S", each.answer)) <= 20]
    perfect = captions.corpus_metrics(whole)
    pairs = [(name, perfect[f"{name}/CIDEr-D"], 10.0) for name in ("plain", "ptb", "lmms_eval")]
    table.compare("captions", "CIDEr-D of captions that equal their references", "the highest value, 10", pairs)


def caption(draw: random.Random) -> str:
    return " ".join(draw.choice(NOUNS.split()) for _ in range(draw.randint(4, 14)))


def main() -> None:
    for package, name in (("lmms-eval", "lmms_eval"), ("pycocoevalcap", "ptb"), ("llava-torch", "llava")):
        if not version(package).startswith(PEERS[name].split()[-1]):
            sys.exit(f"{package} {version(package)} is installed, but metrics are named after {PEERS[name]}.")
    logger.disable("lmms_eval")
    table = Table()
    for check in (check_vqa, check_gqa, check_pope, check_scienceqa, check_mmbench, check_captions):
        check(table, random.Random(0))
    print(table.to_markdown())
    if table.differing:
        sys.exit(f"{table.differing} scores differ.")


if __name__ == "__main__":
    main()

"""What an evaluation is asked for. The fields are options of the commands, so nothing large is imported here.

>>> Evaluation("runs/demo/model", ["easy_vqa"], "runs/demo/data", Path("runs/demo/evaluation"), limit=100)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from sq_llava.inference.settings import AskSettings, Device, Dtype
from sq_llava.llm_client.settings import ChatSettings


@dataclass(frozen=True)
class JudgeSettings(ChatSettings):
    """The language model that grades answers."""

    option_prefix: str = "--judge-"
    attempts: Annotated[int, Option(min=1, help="How often an answer is asked for, until one can be read.")] = 3
    swap: Annotated[bool, Option(help="Compare answers in both orders, which takes twice the requests.")] = False


@dataclass(frozen=True)
class Evaluation:
    """
    Args:
        tasks (`Sequence[str]`): Names in `sq_llava.evaluation.run.TASKS`.
        data (`str`): As of [`Data.locate`].
        out (`Path`): Folder for everything that is written; a run that was killed is resumed from it.
        judge (`JudgeSettings`, *optional*): Who grades the tasks that need a judge.
        judge_folder (`Path`, *optional*): For the judge's answers, whose number and price the caps are about; default:
            `out`.
    """

    model: Annotated[str, Option("-m", help="SQ-LLaVA folder or Hub id, or another model of transformers.")]
    tasks: Sequence[str]
    data: str
    out: Path
    split: Annotated[str | None, Option(help="Split of the data. Default: the one of the paper's figure.")] = None
    limit: Annotated[int | None, Option(min=1, help="Evaluate at most N examples per task, evenly spaced.")] = None
    batch_size: Annotated[int, Option(min=1, help="Number of prompts at a time, on each process.")] = 8
    system_message: Annotated[
        str | None,
        Option(help="System message; vicuna: as the authors evaluate released checkpoints. Default: the model's."),
    ] = None
    dtype: Dtype = "auto"
    device: Device = None
    trust_remote_code: Annotated[bool, Option(help="Run the code in another model's folder.")] = False
    seed: Annotated[int, Option(help="Random seed.")] = 0
    judge: JudgeSettings | None = None
    judge_folder: Path | None = None


@dataclass(frozen=True)
class QuestionEvaluation:
    """`images` and `image_root` are those of `read_pictures`, `clip` is that of [`ClipScorer`]."""

    model: Annotated[str, Option("-m", help="SQ-LLaVA folder or Hub id.")]
    images: Annotated[str, Option(help="Folder of images, or a dataset in a layout of training.")]
    out: Path
    settings: AskSettings
    image_root: Annotated[str | None, Option(help="Folder that the dataset's image paths are relative to.")] = None
    limit: Annotated[int | None, Option(min=1, help="Use at most N images, evenly spaced.")] = None
    clip: Annotated[str | None, Option(help="A whole CLIP: measure how close texts are to their image.")] = None
    truth: Annotated[str | None, Option(help="easy_vqa: count the questions whose premise is true.")] = None
    dtype: Dtype = "auto"
    device: Device = None
    batch_size: Annotated[int, Option(min=1, help="Number of images at a time.")] = 4

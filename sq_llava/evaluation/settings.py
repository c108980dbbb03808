"""Settings of an evaluation. The fields are also command-line options, so nothing large is imported here.

>>> Evaluation("runs/demo/model", ["easy_vqa"], "runs/demo/data", Path("runs/demo/evaluation"), limit=100)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Option

from sq_llava.inference.settings import AskSettings, Device, Dtype, SelfQuestioning
from sq_llava.llm_client.settings import ChatSettings


KEY_VARIABLE = "OPENAI_API_KEY"
AGAINST = "against"  # folder in an evaluation's output for the model that it is compared with
JUDGED, SERVED = "judge.jsonl", "served.jsonl"  # answers of the judge, and of a model on a server


@dataclass(frozen=True)
class JudgeSettings(ChatSettings):
    """The language model that grades answers."""

    option_prefix: str = "--judge-"
    attempts: Annotated[int, Option(min=1, help="Maximum number of attempts to get a grade that can be read.")] = 3
    swap: Annotated[
        bool, Option(help="LLaVA-Bench: also judge the answers in the other order. Needs twice the requests.")
    ] = False


@dataclass(frozen=True)
class ServerSettings(ChatSettings):
    """A model to evaluate that runs on an OpenAI-compatible server."""

    base_url: Annotated[
        str | None,
        Option(help="URL of an OpenAI-compatible server (vLLM, sq-llava serve, ...), ending in /v1."),
    ] = None
    api_key_env: Annotated[
        str, Option(metavar="VARIABLE", help="Environment variable with the key of the server, if it needs one.")
    ] = KEY_VARIABLE


@dataclass(frozen=True)
class Evaluation:
    """
    Settings of `sq-llava evaluate`. Fields that are not listed here have a help text.

    Args:
        model (`str`): Folder or Hub id of an SQ-LLaVA, or of another model in transformers; or its name on `server`.
        tasks (`Sequence[str]`): Names from `sq_llava.evaluation.run.TASKS`.
        data (`str`): A folder, a Hub id, or `"hub"`; see [`Data.locate`].
        out (`Path`): Output folder. An interrupted run resumes from it.
        thinking (`SelfQuestioning`): Questions that the model asks itself before each answer.
        server (`ServerSettings`, *optional*): The server that `model` runs on, instead of a model to load.
        judge (`JudgeSettings`, *optional*): The judge, for tasks that need one.
        others (`Sequence[Path]`): Output folders of the other models of the same command. Answers of a judge or a
            server that are in them are used, and count toward the limits on requests and cost.
    """

    model: str
    tasks: Sequence[str]
    data: str
    out: Path
    split: Annotated[str | None, Option(help="Split of the data. Default: the split that the paper reports.")] = None
    limit: Annotated[
        int | None,
        Option(
            min=1,
            help="Evaluate at most N examples per task, evenly spaced. MMBench: about N, because the rotations of a "
            "question stay together.",
        ),
    ] = None
    batch_size: Annotated[int, Option(min=1, help="Batch size per process, in prompts.")] = 8
    system_message: Annotated[
        str | None,
        Option(
            help="System message. vicuna: the message of Vicuna, as in the authors' evaluation. Default: the model's."
        ),
    ] = None
    dtype: Dtype = "auto"
    device: Device = None
    trust_remote_code: Annotated[bool, Option(help="Allow a model to run code from its own repository.")] = False
    seed: Annotated[int, Option(help="Random seed.")] = 0
    thinking: SelfQuestioning = field(default_factory=SelfQuestioning)
    server: ServerSettings | None = None
    judge: JudgeSettings | None = None
    others: Sequence[Path] = ()

    def __post_init__(self):
        if self.server is None:
            return
        if self.thinking.self_questions:
            raise ValueError("--self-questions has no effect on a model on a server (--base-url). Leave it out.")
        for name in ("batch_size", "dtype", "device", "trust_remote_code"):
            if getattr(self, name) != getattr(Evaluation, name):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has no effect on a model on a server (--base-url). Leave it out.")

    def journals(self, name: str) -> list[Path]:
        """
        Files of paid answers: the evaluation's own, then those that it also uses and counts.

            >>> Evaluation("a", [], "data", Path("runs/a"), others=[Path("runs/b")]).journals("judge.jsonl")[:2]
            [PosixPath('runs/a/judge.jsonl'), PosixPath('runs/a/against/judge.jsonl')]
        """
        folders = (each for folder in (self.out, *self.others) for each in (folder, folder / AGAINST))
        return [folder / name for folder in dict.fromkeys(folders)]


@dataclass(frozen=True)
class QuestionEvaluation:
    """Settings of `sq-llava evaluate-questions`. For `images` and `image_root` see `read_pictures`."""

    model: Annotated[str, Option("-m", help="SQ-LLaVA: folder or Hub id.")]
    images: Annotated[str, Option(help="Folder of images, or a dataset in any format that training reads.")]
    out: Path
    settings: AskSettings
    image_root: Annotated[str | None, Option(help="Folder that the dataset's image paths are relative to.")] = None
    limit: Annotated[int | None, Option(min=1, help="Use at most N images, evenly spaced.")] = None
    clip: Annotated[
        str | None, Option(help="CLIP model to measure how well texts fit their image: folder or Hub id.")
    ] = None
    truth: Annotated[
        str | None,
        Option(
            help="easy_vqa (only for images of easy-VQA): measure how many questions have its form and assume no "
            "shape or colour that is not in the image."
        ),
    ] = None
    dtype: Dtype = "auto"
    device: Device = None
    batch_size: Annotated[int, Option(min=1, help="Batch size per process, in images.")] = 4

"""What making data is asked for. The fields are options of the commands, so nothing large is imported here.

>>> FilterSettings(min_log_probability=-0.5)
"""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from sq_llava.generation.rows import Shard
from sq_llava.inference.settings import AskSettings, Device, Dtype
from sq_llava.llm_client.settings import ChatSettings


PROMPTS = files("sq_llava.generation") / "prompts"
# What "needs the image" is asked of: of this very turn, of its question about any image of the set, of nothing.
BLANK_TESTS = ("turn", "question", "off")

Out = Annotated[Path, Option(help="Folder to write. The same command resumes a run that was stopped.")]
Limit = Annotated[int | None, Option(min=1, help="Use only the first N of the input.")]
Seed = Annotated[int, Option(help="Random seed.")]
PromptFolder = Annotated[
    Path, Option(help="Folder of prompts; start from a copy: generate-data prompts.", show_default="the library's")
]


@dataclass(frozen=True)
class LlavaSettings:
    """
    Args:
        captions, instances (`Path`): As of [`read_scenes`].
        chat (`ChatSettings`): Whom to ask.
        prompts (`Path`): Folder of [`read_prompts`].
        shares (`str`): Of the kinds, as of [`parse_shares`]; the default are thousands of rows in LLaVA's set.
        shard (`Shard`): The part of the images.
    """

    captions: Annotated[Path, Argument(help="COCO's captions_*.json, or .jsonl: image, captions, boxes.")]
    instances: Annotated[Path | None, Option(help="COCO's instances_*.json, for the boxes.")]
    out: Out
    chat: ChatSettings
    prompts: PromptFolder = PROMPTS / "llava"
    shares: Annotated[str, Option(help="Shares of the kinds of rows.")] = "conversation=58,detail=23,reasoning=77"
    kinds_per_image: Annotated[int, Option(min=1, max=3, help="Rows for each image, of different kinds.")] = 1
    limit: Limit = None
    seed: Seed = 0
    shard: Shard = field(default_factory=Shard)


@dataclass(frozen=True)
class CaptionSettings:
    """
    Args:
        captions (`Path`): As of [`CaptionFile`].
        image_root (`Path`): What the paths of images are relative to, and stay inside of.
        prompts (`Path`): Folder with `instructions.txt`, one a line.
    """

    captions: Annotated[Path, Argument(help=".json, .jsonl, .csv or .tsv with image, caption (and id) in a row.")]
    image_root: Annotated[Path, Option(help="Folder that image paths are relative to.")]
    out: Out
    spacy_model: Annotated[str, Option(help="spaCy pipeline with a parser: name or folder. None is downloaded.")]
    prompts: PromptFolder = PROMPTS / "captions"
    limit: Limit = None
    seed: Seed = 0
    shard: Shard = field(default_factory=Shard)
    num_proc: Annotated[int, Option(min=1, help="Number of processes of spaCy.")] = 1


@dataclass(frozen=True)
class CurateSettings:
    """
    Args:
        images (`Path`): A folder, with those below it; the image root.
        decisions (`Path`, *optional*): What a person decided on the review sheet.
    """

    images: Annotated[Path, Argument(help="Folder of images, with those below it.")]
    out: Out
    decisions: Annotated[Path | None, Option(help="The file that was saved from the review sheet.")] = None
    limit: Limit = None
    seed: Seed = 0
    shard: Shard = field(default_factory=Shard)


@dataclass(frozen=True)
class DescribeSettings:
    """How a model of this library describes; `max_new_tokens` are those of a description, and of its continuation."""

    short: Annotated[int, Option(min=0, help="Continue descriptions of at most N tokens.")] = 80
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum length of an answer of --describer, in tokens.")] = 512
    batch_size: Annotated[int, Option(min=1, help="Number of images at a time, for --describer.")] = 8
    device: Device = None
    dtype: Dtype = "auto"


@dataclass(frozen=True)
class FilterSettings:
    """
    What a turn must be to be kept; `None` switches a filter off.

    Args:
        blank_test (`str`): `"turn"`: its answer must change when the image is blanked. `"question"`: that of its
            question must, about one image of the set at least: else "no" to "is there a dog?" is lost where there is
            none, as a blank image gets the same answer. What is left then may say "yes" to everything, and cost more
            than all false answers do (benchmarks/results/self_training.md). `"off"`: no test.
        min_log_probability (`float`): A high one leaves true answers, but can leave "no" alone of a weak model's: look
            at the shares.
        max_overlap (`float`): Of words and pairs of words, the share that the two questions have in common.
        max_repeats (`int`): LLaVA has such a cap for phrases.
        max_per_type, balance_yes_no: The turns that are kept are drawn by `seed`.
    """

    blank_test: Annotated[
        str, Option(help="turn: a blank image must change its answer; question: of one image at least; off.")
    ] = "question"
    min_drop: Annotated[
        float, Option(help="Log-probability per token that an answer must lose with a blank image, in the same test.")
    ] = 0.0
    min_log_probability: Annotated[
        float | None, Option(help="Minimum log-probability of an answer, as the mean over its tokens.")
    ] = -1.0
    min_clip_score: Annotated[float | None, Option(help="Minimum CLIPScore of image and turn; needs --clip.")] = None
    max_overlap: Annotated[
        float | None, Option(min=0, max=1, help="Maximum share of words in common with a question on the same image.")
    ] = 0.7
    max_set_overlap: Annotated[
        float | None, Option(min=0, max=1, help="Maximum share of word pairs that earlier questions have.")
    ] = None
    max_repeats: Annotated[int | None, Option(min=1, help="Maximum number of times of one question in the set.")] = 100
    max_per_type: Annotated[
        int | None, Option(min=1, help="Maximum number of turns of one type of question in the set.")
    ] = None
    balance_yes_no: Annotated[bool, Option(help='Keep as many "yes" as "no" in the set.')] = False
    seed: int = 0

    def __post_init__(self):
        if self.blank_test not in BLANK_TESTS:
            raise ValueError(f"--blank-test is {self.blank_test!r}: choose one of {', '.join(BLANK_TESTS)}.")


@dataclass(frozen=True)
class SelfGeneration:
    """`images` and `image_root` are those of `read_pictures`, `clip` is that of [`ClipScorer`]."""

    model: Annotated[str, Option("-m", help="SQ-LLaVA folder or Hub id.")]
    images: Annotated[str, Argument(help="Folder of images, or a dataset of training, without its questions.")]
    out: Out
    ask: AskSettings = field(default_factory=AskSettings)
    filters: FilterSettings = field(default_factory=FilterSettings)
    image_root: Annotated[
        str | None, Option(help="Folder that image paths are relative to. Default: that of the images.")
    ] = None
    limit: Limit = None
    shard: Shard = field(default_factory=Shard)
    clip: Annotated[str | None, Option(help="A whole CLIP, for the filter by CLIPScore.")] = None
    judge: ChatSettings | None = None
    prompts: PromptFolder = PROMPTS / "self"
    dtype: Dtype = "auto"
    device: Device = None
    batch_size: Annotated[int, Option(min=1, help="Number of images at a time, on each process.")] = 4

    def __post_init__(self):
        if self.filters.min_clip_score is not None and self.clip is None:
            raise ValueError("--min-clip-score needs --clip: a folder or Hub id of a whole CLIP.")

    @property
    def progress(self) -> Path:
        """Where the lines of the models stand; each shard's own."""
        shard = self.shard
        return self.out if shard.count == 1 else self.out / f"shard-{shard.index:05}-of-{shard.count:05}"

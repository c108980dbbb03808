"""Settings of `sq-llava generate-data`. The fields are command options, so this module imports nothing slow.

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
# The answer that must change with a blank image: the turn's own, that of any turn with the same question, none.
BLANK_TESTS = ("turn", "question", "off")

Out = Annotated[Path, Option(help="Output folder. The same command resumes a run that was stopped.")]
Limit = Annotated[int | None, Option(min=1, help="Use only the first N images or captions.")]
Seed = Annotated[int, Option(help="Random seed.")]
MaxBadShare = Annotated[
    float,
    Option(
        min=0,
        max=1,
        help="Stop before the work starts if more than this share of the rows of the input cannot be used. Up to "
        "this share, they are left out and listed in bad_rows.jsonl.",
    ),
]
PromptFolder = Annotated[
    Path,
    Option(
        help="Folder of prompts. Copy the library's with: sq-llava generate-data prompts METHOD NEW_FOLDER.",
        show_default="the library's",
    ),
]


@dataclass(frozen=True)
class LlavaSettings:
    """
    Args:
        captions, instances (`Path`): Files that [`read_scenes`] reads.
        chat (`ChatSettings`): The server, and the limits on requests and cost.
        prompts (`Path`): Folder that `read_prompts` in `llava.py` reads.
        shares (`str`): Shares of the kinds of rows, as [`parse_shares`] reads them. LLaVA's set has 58, 23 and 77
            thousand rows.
        shard (`Shard`): The part of the images to work on.
    """

    captions: Annotated[
        Path, Argument(help="COCO's captions_*.json, or a .jsonl file with image, captions and boxes.")
    ]
    instances: Annotated[Path | None, Option(help="COCO's instances_*.json with the boxes.")]
    out: Out
    chat: ChatSettings
    prompts: PromptFolder = PROMPTS / "llava"
    shares: Annotated[
        str,
        Option(help="Shares of the three kinds of rows.", show_default="conversation=58, detail=23, reasoning=77"),
    ] = "conversation=58,detail=23,reasoning=77"
    kinds_per_image: Annotated[int, Option(min=1, max=3, help="Rows per image, each of a different kind.")] = 1
    max_bad_share: MaxBadShare = 0.1
    limit: Limit = None
    seed: Seed = 0
    shard: Shard = field(default_factory=Shard)


@dataclass(frozen=True)
class CaptionSettings:
    """
    Args:
        captions (`Path`): File that [`CaptionFile`] reads.
        image_root (`Path`): Folder that image paths are relative to. No path may leave it.
        prompts (`Path`): Folder with `instructions.txt`, one instruction per line.
    """

    captions: Annotated[
        Path,
        Argument(
            help="A .json, .jsonl, .csv or .tsv file with image and caption; a .tsv of Conceptual Captions without a "
            "header; or LLaVA's pretraining JSON."
        ),
    ]
    image_root: Annotated[Path, Option(help="Folder that image paths are relative to.")]
    out: Out
    spacy_model: Annotated[str, Option(help="spaCy pipeline with a parser: name of an installed one, or a folder.")]
    prompts: PromptFolder = PROMPTS / "captions"
    max_bad_share: MaxBadShare = 0.1
    limit: Limit = None
    seed: Seed = 0
    shard: Shard = field(default_factory=Shard)
    num_proc: Annotated[int, Option(min=1, help="Number of spaCy processes.")] = 1


@dataclass(frozen=True)
class CurateSettings:
    """
    Args:
        images (`Path`): Folder of images, searched with its subfolders. It is the image root of the rows.
        decisions (`Path`, *optional*): The decisions of a person, saved from the review page.
    """

    images: Annotated[Path, Argument(help="Folder of images; subfolders are searched too.")]
    out: Out
    decisions: Annotated[Path | None, Option(help="decisions.json that the review page saved.")] = None
    limit: Limit = None
    seed: Seed = 0
    shard: Shard = field(default_factory=Shard)


@dataclass(frozen=True)
class DescribeSettings:
    """Settings of a local model that describes images. `max_new_tokens` limits description and continuation each."""

    short: Annotated[
        int, Option(min=0, help="If a description has N tokens or fewer, ask the model to continue it.")
    ] = 80
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum length of a text from --describer, in tokens.")] = 512
    batch_size: Annotated[int, Option(min=1, help="Batch size of --describer.")] = 8
    device: Device = None
    dtype: Dtype = "auto"


@dataclass(frozen=True)
class FilterSettings:
    """
    Conditions that a turn must meet to be kept. `None` switches a filter off.

    Args:
        blank_test (`str`): `"turn"` keeps a turn only if its answer changes when the image is blanked. `"question"`
            keeps all turns of a question whose answer changes for at least one image of the set. `"off"` keeps all.
            `"turn"` also drops a correct "no" to "is there a dog?", because a blank image gives "no" too. A model
            trained on the rest may answer "yes" to everything. This does more harm than all wrong answers
            (benchmarks/results/self_training.md).
        min_log_probability (`float`): A high value keeps true answers. With a weak model, it can keep nothing but
            "no": check the shares in the data card.
        max_overlap (`float`): Highest Jaccard index of the words and word pairs of two questions about one image.
        max_repeats (`int`): Cap on equal questions, like LLaVA's cap on phrases.
        max_per_type, balance_yes_no: `seed` decides which turns are kept.
    """

    blank_test: Annotated[
        str,
        Option(
            help="Test whether answers change with a blank image. turn: drop each turn whose answer stays the same. "
            "question: drop a question if, for every image, its answer stays the same with the blank image. "
            "off: no test."
        ),
    ] = "question"
    min_drop: Annotated[
        float,
        Option(
            help="For --blank-test: how much lower an answer's log-probability per token must be with a blank image."
        ),
    ] = 0.0
    min_log_probability: Annotated[
        float | None, Option(help="Minimum log-probability of an answer (mean over its tokens).")
    ] = -1.0
    min_clip_score: Annotated[float | None, Option(help="Minimum CLIPScore of image and turn. Needs --clip.")] = None
    max_overlap: Annotated[
        float | None, Option(min=0, max=1, help="Maximum word overlap with another question about the same image.")
    ] = 0.7
    max_set_overlap: Annotated[
        float | None,
        Option(
            min=0, max=1, help="Maximum share of a question's word pairs that occur in questions about earlier images."
        ),
    ] = None
    max_repeats: Annotated[int | None, Option(min=1, help="Maximum number of equal questions in the set.")] = 100
    max_per_type: Annotated[
        int | None, Option(min=1, help="Maximum number of turns per type of question in the set.")
    ] = None
    balance_yes_no: Annotated[bool, Option(help='Keep as many answers "yes" as "no" in the set.')] = False
    seed: int = 0

    def __post_init__(self):
        if self.blank_test not in BLANK_TESTS:
            raise ValueError(f"--blank-test is {self.blank_test!r}: choose one of {', '.join(BLANK_TESTS)}.")


@dataclass(frozen=True)
class SelfGeneration:
    """`images` and `image_root` are read by `read_pictures`, `clip` by [`ClipScorer`]."""

    model: Annotated[str, Option("-m", help="SQ-LLaVA: folder or Hub id.")]
    images: Annotated[str, Argument(help="Folder of images, or a training dataset (only its images are used).")]
    out: Out
    ask: AskSettings = field(default_factory=AskSettings)
    filters: FilterSettings = field(default_factory=FilterSettings)
    image_root: Annotated[
        str | None,
        Option(help="Folder that image paths are relative to. Default: the folder of the images or of the dataset."),
    ] = None
    limit: Limit = None
    shard: Shard = field(default_factory=Shard)
    clip: Annotated[str | None, Option(help="CLIP model for the CLIPScore: folder or Hub id.")] = None
    judge: ChatSettings | None = None
    prompts: PromptFolder = PROMPTS / "self"
    dtype: Dtype = "auto"
    device: Device = None
    batch_size: Annotated[int, Option(min=1, help="Batch size per process, in images.")] = 4

    def __post_init__(self):
        if self.filters.min_clip_score is not None and self.clip is None:
            raise ValueError("--min-clip-score needs --clip, the folder or Hub id of a CLIP model.")

    @property
    def progress(self) -> Path:
        """Folder of the models' answers and scores. Each shard has its own."""
        shard = self.shard
        return self.out if shard.count == 1 else self.out / f"shard-{shard.index:05}-of-{shard.count:05}"

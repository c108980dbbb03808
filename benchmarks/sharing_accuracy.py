"""Does learning suffer when rows about one image stand in one step? easy-VQA with and without share_images.

    python -m benchmarks.sharing_accuracy --jobs 2   # writes benchmarks/results/sharing_accuracy.{json,md}

It needs runs/demo, the output of `make demo`. Each conversation is split into rows of one question each, so that about
six rows show one image. A stage 2 trains on them from the demo's stage 1, packed, for one epoch, with `share_images`
and without. Both have about the same number of rows per step. Accuracy is measured on test images. Both runs of a seed
train on the same rows; the seed decides their order and the new weights.

A finished run is a JSON file in `--work`. The same command later runs only the missing runs.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import train_sft
from benchmarks import ablation
from benchmarks.ablation import RECIPES, Scale, interval, points, read_note, run_all, score, seed_data
from benchmarks.common import document, table, text, write
from demo.data import image_root
from sq_llava.inference.assistant import Assistant
from sq_llava.training.packing import pack_sampler
from sq_llava.training.settings import parse_recipe


COMMAND = "python -m benchmarks.sharing_accuracy"
MAX_LENGTH = 256


@dataclass(frozen=True)
class Run(ablation.Task):
    """A stage 2 with or without shared images, and its accuracy."""

    base: str
    seed: int
    share: bool
    num_conversations: int
    rows_per_step: int
    test_stride: int

    @property
    def name(self) -> str:
        return f"seed-{self.seed}/{'shared' if self.share else 'apart'}"

    @property
    def facts(self) -> dict:
        names = ("base", "seed", "share", "num_conversations", "rows_per_step", "test_stride")
        return {name: getattr(self, name) for name in names}

    def run(self) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            data = self.single_questions(Path(folder))
            packs_per_step = round(self.rows_per_step / self.rows_per_pack(data))
            trainer = train_sft.train(*self.settings(data, folder, packs_per_step))
        model = trainer.model.merge_and_unload().eval()
        scale = Scale(self.base, test_stride=self.test_stride, num_images=2)
        scores = score(Assistant(model, trainer.processing_class), seed_data(self), scale)
        return scores | {
            "rows": len(trainer.train_dataset),
            "steps": trainer.state.max_steps,
            "tokens": sum(map(trainer.packs.size, trainer.packs.packs(0))),
        }

    def single_questions(self, folder: Path) -> Path:
        """Writes the rows: one for each question of the first conversations."""
        conversations = json.loads((seed_data(self) / "stage2_train.json").read_text())[: self.num_conversations]
        rows = []
        for row in conversations:
            turns = row["conversations"]
            for begin in range(0, len(turns), 2):
                question = turns[begin]["value"].removeprefix("<image>\n")
                pair = [{"from": "human", "value": f"<image>\n{question}"}, turns[begin + 1]]
                rows.append({"id": f"{row['id']}-{begin}", "image": row["image"], "conversations": pair})
        path = folder / "rows.json"
        path.write_text(json.dumps(rows))
        return path

    def settings(self, data: Path, folder: str, packs_per_step: int) -> tuple:
        settings = {
            "seed": self.seed, "max_steps": -1, "num_train_epochs": 1, "image_root": image_root(),
            "dataset_path": data, "model_name_or_path": f"{self.base}/stage1", "output_dir": folder,
            "packing": True, "share_images": self.share, "max_length": MAX_LENGTH,
            "per_device_train_batch_size": packs_per_step, "doctor": "off", "disable_tqdm": True,
            "save_strategy": "no",
        }  # fmt: skip
        return parse_recipe(RECIPES / "stage2.yaml", **settings)

    def rows_per_pack(self, data: Path) -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments, args, model_config = self.settings(data, folder, 1)
            train_sft.complete_settings(arguments, args)
            _, processor, _ = train_sft.load_base(arguments, args, model_config, None)
            rows, _ = train_sft.read_rows(arguments, args, processor)
            packs = pack_sampler(rows, args, 1, max_rows_per_image=arguments.rows_per_image_pass)
            return len(rows) / packs.num_packs


def to_markdown(report: dict) -> str:
    runs = {(run["share"], run["seed"]): run for run in report["runs"]}
    seeds = sorted({seed for _, seed in runs})
    rows = []
    for share in (False, True):
        own = [runs[share, seed] for seed in seeds]
        values = [run["accuracy"] for run in own]
        difference = interval([runs[True, seed]["accuracy"] - runs[False, seed]["accuracy"] for seed in seeds])
        rows.append([
            "shared" if share else "not shared",
            f"{statistics.fmean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})",
            points(difference) if share else "",
            f"{own[0]['tokens']:,}",
            own[0]["steps"],
        ])  # fmt: skip
    first = report["runs"][0]
    return text(
        "# Accuracy with and without shared images",
        f"Measured with `{report['command']}` for the seeds {', '.join(map(str, seeds))}; torch {report['torch']}, "
        "one CPU thread per run.",
        f"One epoch of {first['rows']:,} rows of easy-VQA, one question each, about six for each image, from the "
        f"demo's stage 1; about {first['rows_per_step']} rows per step. Accuracy is exact match on every "
        f"{first['test_stride']}th test question ({first['test_questions']:,}). The difference is in percentage "
        "points between runs of the same seed, with a 95% interval by Student's t; it is bold if the interval does "
        "not include 0.",
        table(["images", "accuracy", "minus not shared", "tokens computed", "steps"], rows),
    )


def main(args: list[str] | None = None) -> None:
    parser = ablation.make_parser(__doc__, "stage1", "runs/sharing_accuracy", [0, 1, 2])
    parser.add_argument("--num-conversations", type=int, default=1500, help="Number of conversations to split.")
    parser.add_argument("--rows-per-step", type=int, default=64, help="Rows per optimizer step, approximately.")
    parser.add_argument("--test-stride", type=int, default=4, help="Evaluate on every N-th test question.")
    arguments = parser.parse_args(args)
    if arguments.quick:
        arguments.seeds, arguments.num_conversations, arguments.test_stride = arguments.seeds[:1], 30, 200
    shared = (arguments.num_conversations, arguments.rows_per_step, arguments.test_stride)
    base = str(arguments.base)
    tasks = [Run(arguments.work, base, seed, share, *shared) for seed in arguments.seeds for share in (False, True)]
    left = [task.name for task in tasks if read_note(task) is None]
    print(f"{len(left)} of {len(tasks)} to run: {', '.join(left)}")
    if arguments.plan:
        return
    ablation.require_base(arguments.base, "stage1/adapter_config.json")
    run_all(tasks, arguments.jobs)
    report = {"command": COMMAND, "torch": torch.__version__, "runs": [read_note(task) for task in tasks]}
    markdown = document(report, to_markdown)
    print(markdown)
    if not arguments.quick:
        write(arguments.output_dir, "sharing_accuracy", report, markdown)


if __name__ == "__main__":
    main()

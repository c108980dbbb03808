"""Train SQ-LLaVA: stage 1 (align, on captions), stage 2 (instruct, on conversations).

    accelerate launch -m train_sft --config recipes/sq-llava-7b/stage1.yaml
    accelerate launch -m train_sft --config recipes/sq-llava-7b/stage2.yaml

A setting on the command line replaces the one in the recipe:

    python -m train_sft --config recipes/sq-llava-7b/stage1.yaml --max_steps 100

Most settings come from TRL. docs/settings.md shows which of them are refused.

The same in Python:

    import train_sft
    from sq_llava.training.settings import parse_recipe
    trainer = train_sft.train(*parse_recipe("recipes/sq-llava-7b/stage1.yaml", max_steps=100))

On SIGTERM or SIGINT, the run saves a checkpoint and exits with code 75 (a
launcher such as torchrun then exits with 1). `--resume` resumes a run that was
stopped or killed. The result is the same as without the stop.

A sample of the data is checked before training: see `sq-llava doctor` and the
setting `doctor`.

`--dry_run real` trains one step on the longest rows and prints the memory that
it took. `--dry_run meta` estimates the memory without loading weights.

The result is a PEFT adapter and the processor in `output_dir`. `sq-llava merge`
makes a plain checkpoint of them. With `full_finetuning`, which trains the
language model's own weights as LLaVA does, the result is a plain checkpoint.
The vision tower's own weights are never trained. To start from a released
checkpoint, convert it first: `sq-llava convert`.
"""

import shutil
import signal
import sys
from pathlib import Path

from sq_llava.console import errors_in_one_line
from sq_llava.early_checks import require_recipe_of
from sq_llava.stopping import one_line_when_stopped, stop_at_once


if __name__ == "__main__":  # before the slow imports below
    signal.signal(signal.SIGINT, stop_at_once)
    with errors_in_one_line():
        require_recipe_of(sys.argv[1:])

import datasets
from accelerate import PartialState
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from transformers.utils.versions import require_version
from trl import ModelConfig, SFTConfig

from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.card import write_card
from sq_llava.checkpoints.chat_templates import check_template
from sq_llava.checkpoints.provenance import read_provenance, record_stage
from sq_llava.data.lengths import LengthBound, with_length_bounds
from sq_llava.data.rows import hold_out, load_rows
from sq_llava.doctor.check import data_check
from sq_llava.doctor.report import SAMPLE_ROWS, check_before_training
from sq_llava.locations import fetch
from sq_llava.output import output_lock
from sq_llava.training.collator import EpochCallback, SelfQuestioningCollator
from sq_llava.training.generation_check import GenerationCheck
from sq_llava.training.planning import (
    complete_settings,
    leave_one_step,
    plan_from_configs,
    print_parameters,
    resident_peak,
    try_one_step,
)
from sq_llava.training.recovery import EXIT_TRY_AGAIN, find_checkpoint, require_plain_states, warn_of_changes
from sq_llava.training.settings import SQLlavaArguments, parse_settings, require_extras
from sq_llava.training.sharding import (
    require_launch,
    require_resumable,
    require_same_checkpoint,
    sharding_asked_for,
)
from sq_llava.training.stage_model import (
    DRY_RUN_BASE,
    load_base,
    prepare_stage,
    require_other_folder,
    starting_point,
    template_needs,
)
from sq_llava.training.text_probe import TextProbe, read_text_probe, summarize
from sq_llava.training.trainer import SQLlavaTrainer


def main(args: list[str] | None = None) -> SQLlavaTrainer | None:
    return train(*parse_settings(args, __doc__))


def train(arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig) -> SQLlavaTrainer | None:
    """
    Trains one stage. With `dry_run`, it trains a single step (`real`) or only estimates the memory (`meta`).

    Args:
        arguments, training_args, model_config: As returned by `parse_settings` or `parse_recipe`. Changed in place.

    Returns:
        [`SQLlavaTrainer`]: The trainer after training; `None` with `dry_run` `meta`.

    Raises:
        ValueError: for settings, data or models that cannot be trained as asked.
    """
    # Before transformers 5.18, the mask of the tokens in the loss is wrong after an image.
    require_version("transformers>=5.18")
    num_processes = complete_settings(arguments, training_args)
    if arguments.dry_run == "meta":
        return plan_from_configs(arguments, training_args, model_config, num_processes)
    with output_lock(training_args.output_dir, needed=PartialState().is_main_process):
        try:
            return train_stage(arguments, training_args, model_config)
        finally:
            if PartialState().is_main_process:
                shutil.rmtree(Path(training_args.output_dir) / DRY_RUN_BASE, ignore_errors=True)


def train_stage(arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig) -> SQLlavaTrainer:
    """Does what [`train`] does, once the output folder is locked."""
    require_extras(training_args, model_config)
    start, _ = starting_point(arguments, model_config)
    require_other_folder(start, training_args.output_dir)
    sharding = sharding_asked_for(training_args)
    resident_before = resident_peak()
    set_seed(training_args.seed)
    with PartialState().main_process_first():
        came_from = read_provenance(fetch(start)) if start else {}
        checkpoint = find_checkpoint(training_args.output_dir, arguments.resume, training_args.resume_from_checkpoint)
        if checkpoint is not None:
            require_resumable(checkpoint, sharding, training_args.world_size)
            require_plain_states(checkpoint)
        probe_rows = None if arguments.text_probe is None else read_text_probe(arguments.text_probe)
        check_data(arguments, training_args, model_config)
    require_same_checkpoint(checkpoint, training_args.world_size)

    model, processor, previous_stage = load_base(arguments, training_args, model_config, checkpoint)
    check_template(processor, template_needs(arguments))
    rows, eval_rows = read_rows(arguments, training_args, processor)
    model = prepare_stage(model, previous_stage, arguments, model_config)
    steps = leave_one_step(rows, arguments, training_args) if arguments.dry_run == "real" else None
    trainer = make_trainer(model, processor, rows, eval_rows, probe_rows, arguments, training_args)
    require_launch(sharding, trainer.accelerator)
    if trainer.accelerator.is_main_process:
        print_parameters(model, arguments.part_learning_rates, training_args.learning_rate)
        if trainer.packs is not None:
            print(trainer.packs.describe())
        if checkpoint is not None:
            warn_of_changes(checkpoint, trainer.run)
    if arguments.dry_run == "real":
        try_one_step(trainer, resident_before)
        if trainer.accelerator.is_main_process:
            print(steps)
        return trainer
    run(trainer, checkpoint)
    if trainer.accelerator.is_main_process:
        steps, probed = trainer.state.global_step, summarize_text_probe(trainer)
        record_stage(came_from, arguments, training_args, model_config, trainer.run, steps, probed)
        if arguments.full_finetuning:
            write_card(training_args.output_dir)
    return trainer


def check_data(arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig) -> None:
    """Checks the rows with the doctor, before a model is loaded."""
    if arguments.doctor != "off" and PartialState().is_main_process:
        check = data_check(arguments, training_args, model_config)
        limit = SAMPLE_ROWS if arguments.doctor == "sample" else None
        check_before_training(check, limit, arguments.doctor_command)


def read_rows(
    arguments: SQLlavaArguments, training_args: SFTConfig, processor: SQLlavaProcessor
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Loads the rows to train on (with upper bounds of their lengths, for packing) and the rows to evaluate on."""
    rows, eval_rows = load_rows(arguments.datasets, training_args.seed, processor.image_seq_length), None
    if arguments.eval_datasets:
        eval_rows = load_rows(arguments.eval_datasets, training_args.seed, processor.image_seq_length)
    elif arguments.num_eval_rows:
        rows, eval_rows = hold_out(rows, arguments.num_eval_rows, training_args.seed)
    if arguments.packing:
        plain = arguments.stage == "align"
        bound = LengthBound(processor, training_args.max_length, plain, arguments.self_question_ratio)
        with PartialState().local_main_process_first():
            rows = with_length_bounds(rows, bound, prefixes=arguments.share_images)
    return rows, eval_rows


def make_trainer(
    model,
    processor: SQLlavaProcessor,
    rows: datasets.Dataset,
    eval_rows: datasets.Dataset | None,
    probe_rows: list[dict] | None,
    arguments: SQLlavaArguments,
    training_args: SFTConfig,
) -> SQLlavaTrainer:
    collator = SelfQuestioningCollator(
        processor,
        plain=arguments.stage == "align",
        self_question_ratio=arguments.self_question_ratio,
        seed=training_args.seed,
        max_length=training_args.max_length,
        pad_to_multiple_of=training_args.pad_to_multiple_of,
    )
    generation_check = None
    if arguments.generation_datasets:
        generation_check = GenerationCheck(load_rows(arguments.generation_datasets, training_args.seed), processor)
        generation_check.require_room(model)
    text_probe = None
    if arguments.text_probe is not None:
        batch_size = training_args.per_device_eval_batch_size
        text_probe = TextProbe.make(arguments.text_probe, probe_rows, collator, batch_size)
    return SQLlavaTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=processor,
        callbacks=[EpochCallback(collator)],
        question_loss_weight=arguments.question_loss_weight,
        part_learning_rates=arguments.part_learning_rates,
        max_loss=arguments.max_loss,
        generation_check=generation_check,
        text_probe=text_probe,
        packing=arguments.packing,
        max_rows_per_image=arguments.rows_per_image_pass,
    )


def summarize_text_probe(trainer: SQLlavaTrainer) -> dict | None:
    """Prints and returns what `text_probe` measured."""
    if trainer.text_probe is None:
        return None
    summary = summarize(trainer.text_probe, trainer.state.log_history)
    print(f"Loss on text_probe: {', '.join(f'{name} {value}' for name, value in summary.items())}")
    return summary


def run(trainer: SQLlavaTrainer, checkpoint: str | None) -> None:
    """Trains and saves. A run stopped by a signal exits the process after its checkpoint is saved."""
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.stopped and trainer.state.global_step < trainer.state.max_steps:
        # A launcher kills the other processes as soon as one exits.
        trainer.accelerator.wait_for_everyone()
        is_saved = trainer.watch.saved_step == trainer.state.global_step
        saved = "Resume with --resume" if is_saved else "This step was not saved"
        trainer.accelerator.print(f"Stopped at step {trainer.state.global_step}. {saved}.")
        sys.exit(EXIT_TRY_AGAIN)
    trainer.save_model()
    trainer.save_state()


def run_script() -> None:
    with one_line_when_stopped(), errors_in_one_line(traceback_of=SQLlavaTrainer.train):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    # A gloo thread that outlives the interpreter would abort the process.
    PartialState().destroy_process_group()


if __name__ == "__main__":
    # After an error in training, a launcher names the process where it came first, with its traceback.
    record(run_script)()

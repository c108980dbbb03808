"""Train SQ-LLaVA: stage 1 ("align", captions) and stage 2 ("instruct", answers and self-questions).

    accelerate launch -m train_sft --config recipes/sq-llava-7b/stage1.yaml
    accelerate launch -m train_sft --config recipes/sq-llava-7b/stage2.yaml

Any setting of a recipe can be given on the command line too, and wins there:

    python -m train_sft --config recipes/sq-llava-7b/stage1.yaml --text_model_name_or_path Qwen/Qwen3-0.6B

Stopped by SIGTERM or SIGINT, it saves a checkpoint and ends with 75 (a launcher such as torchrun ends with 1 then);
killed or stopped, it goes on with `--resume`, as if nothing had been.

The data is checked first, by a sample of its rows: see `sq-llava doctor` and the setting `doctor`.

`--dry_run real` trains one step on the longest rows and says what it takes; `--dry_run meta` says it without weights.

It writes a PEFT adapter with the processor to `output_dir`; `sq-llava merge` makes a plain checkpoint of it. With
`full_finetuning`, which trains the language model's own weights as LLaVA does, it writes a plain checkpoint itself.
What it does not do: train the vision tower's own weights; convert released checkpoints.
"""

import shlex
import signal
import sys

from sq_llava.console import errors_in_one_line
from sq_llava.early_checks import require_recipe_of
from sq_llava.stopping import one_line_when_stopped, stop_at_once


if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, stop_at_once)
    with errors_in_one_line():
        require_recipe_of(sys.argv[1:])

from accelerate import PartialState
from transformers import set_seed
from transformers.utils.versions import require_version

from sq_llava.checkpoints.card import write_card
from sq_llava.checkpoints.provenance import read_provenance, record_stage
from sq_llava.data.lengths import LengthBound, with_sure_lengths
from sq_llava.data.rows import hold_out, load_rows
from sq_llava.doctor.check import data_check
from sq_llava.doctor.report import SAMPLE_ROWS, check_before_training
from sq_llava.locations import fetch
from sq_llava.training.collator import EpochCallback, SelfQuestioningCollator
from sq_llava.training.generation_check import GenerationCheck
from sq_llava.training.packing import pack_sampler
from sq_llava.training.planning import (
    describe_steps,
    leave_one_step,
    plan_from_configs,
    print_parameters,
    resident_peak,
    set_global_batch,
    try_one_step,
)
from sq_llava.training.recovery import EXIT_TRY_AGAIN, find_checkpoint, warn_of_changes
from sq_llava.training.settings import parse_settings, require_extras, starting_point
from sq_llava.training.stage_model import load_base, prepare_stage
from sq_llava.training.trainer import SQLlavaTrainer


def main(args: list[str] | None = None) -> SQLlavaTrainer:
    arguments, training_args, model_config = parse_settings(args, __doc__)
    # Before 5.18, the mask of what is in the loss is wrong behind an image.
    require_version("transformers>=5.18")
    instruct = arguments.stage == "instruct"
    training_args.remove_unused_columns = False  # the collator makes the model's inputs of our columns
    training_args.ddp_find_unused_parameters = False  # every trained weight is in the graph of every batch
    if training_args.data_seed is None:
        training_args.data_seed = training_args.seed  # else, rows come in an order of where PyTorch's seed stands
    num_processes = arguments.num_gpus or training_args.world_size
    if arguments.num_gpus is not None and arguments.dry_run != "meta":
        raise ValueError(f"num_gpus is {arguments.num_gpus}: it is for --dry_run meta; else the launcher says it.")
    if arguments.global_batch_size is not None:
        set_global_batch(training_args, arguments.global_batch_size, num_processes)
    if arguments.dry_run == "meta":
        return plan_from_configs(arguments, training_args, model_config, num_processes)
    command_line = sys.argv[1:] if args is None else args
    require_extras(training_args, model_config)
    start, _ = starting_point(arguments, model_config)
    resident_before = resident_peak()
    set_seed(training_args.seed)
    with PartialState().main_process_first():
        # Read before the training that it is written behind.
        came_from = read_provenance(fetch(start)) if start else {}
        checkpoint = find_checkpoint(training_args.output_dir, arguments.resume, training_args.resume_from_checkpoint)
        if arguments.doctor != "off" and PartialState().is_main_process:
            command = shlex.join(["sq-llava", "doctor", *command_line])
            check = data_check(arguments, training_args, model_config)
            check_before_training(check, SAMPLE_ROWS if arguments.doctor == "sample" else None, command)

    model, processor, previous_stage = load_base(arguments, training_args, model_config, checkpoint)
    rows = load_rows(arguments.datasets, training_args.seed, processor.image_seq_length)
    model = prepare_stage(model, previous_stage, arguments, model_config)

    collator = SelfQuestioningCollator(
        processor,
        plain=not instruct,
        self_question_ratio=arguments.self_question_ratio,
        seed=training_args.seed,
        max_length=training_args.max_length,
        pad_to_multiple_of=training_args.pad_to_multiple_of,
    )
    eval_rows = generation_check = None
    if arguments.eval_datasets:
        eval_rows = load_rows(arguments.eval_datasets, training_args.seed, processor.image_seq_length)
    elif arguments.num_eval_rows:
        rows, eval_rows = hold_out(rows, arguments.num_eval_rows, training_args.seed)
    if arguments.generation_datasets:
        generation_check = GenerationCheck(load_rows(arguments.generation_datasets, training_args.seed), processor)
        generation_check.require_room(model)
    if arguments.packing:
        bound = LengthBound(processor, training_args.max_length, not instruct, arguments.self_question_ratio)
        with PartialState().local_main_process_first():
            rows = with_sure_lengths(rows, bound)
    if arguments.dry_run == "real":
        packs = pack_sampler(rows, training_args, training_args.world_size) if arguments.packing else None
        steps = describe_steps(len(rows), training_args, training_args.world_size, packs)
        leave_one_step(training_args)
    trainer = SQLlavaTrainer(
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
        packing=arguments.packing,
    )
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
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.stopped and trainer.state.global_step < trainer.state.max_steps:
        # A launcher ends the others when the first has ended.
        trainer.accelerator.wait_for_everyone()
        saved = (
            "save_strategy is no, so nothing was saved"
            if training_args.save_strategy == "no"
            else "Go on with --resume"
        )
        trainer.accelerator.print(f"Stopped at step {trainer.state.global_step}. {saved}.")
        sys.exit(EXIT_TRY_AGAIN)
    trainer.save_model()
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        record_stage(came_from, arguments, training_args, model_config, trainer.run, trainer.state.global_step)
        if arguments.full_finetuning:
            write_card(training_args.output_dir)
    return trainer


if __name__ == "__main__":
    with one_line_when_stopped(), errors_in_one_line(traceback_of=SQLlavaTrainer.train):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    # A thread of gloo that lives longer than the interpreter aborts the process.
    PartialState().destroy_process_group()

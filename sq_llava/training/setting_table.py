"""What becomes of each setting: honoured, harmless, or refused. One table, from which the refusals and the docs come.

    python -m sq_llava.training.setting_table > docs/settings.md

It has all fields of `SQLlavaArguments`, of TRL's `ModelConfig` and `SFTConfig`, and of transformers'
`TrainingArguments`. What it does not do: say which settings go together; `sq_llava/training/settings.py` checks that.
"""

from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        verdict: `"honoured"`: it does what it says. `"harmless"`: the run is the one that was asked for, whatever the
            value. `"refused"`: it would do nothing, or something else than it says.
        note (`str`): Of an honoured one the test that shows it, or nothing where the Trainer alone does it; of a
            harmless one why; of a refused one why, and what to do instead.
        values (`tuple`): Values of a refused setting that are taken beside its default: they ask for what is done.
    """

    verdict: Literal["honoured", "harmless", "refused"]
    note: str = ""
    values: tuple = ()


def honoured(test: str) -> Setting:
    return Setting("honoured", test)


def harmless(reason: str) -> Setting:
    return Setting("harmless", reason)


def refused(reason: str, *values: Any) -> Setting:
    return Setting("refused", reason, values)


# Done by the Trainer, by accelerate or by PyTorch, untouched by this project.
TRAINER = Setting("honoured")
PUSH = "What a run leaves is no model that others can load. Run `sq-llava push OUTPUT_DIR ORG/NAME` after it"
NO_PREDICTIONS = (
    "An evaluation has losses and generated answers, but no predictions or metrics of its own: leave it out"
)
LIGER = "Liger has no kernels for the model type sq_llava, and would change nothing: leave it out"
FULL_EVALUATION = "The Trainer heeds it only outside of training, where nothing is evaluated here: leave it out"
CONVERSATIONS = "Rows are conversations of a known layout, prepared batch by batch: leave it out"

OURS = {
    "stage": honoured("training/test_training.py::test_stage_one_trains_vision_lora_extractor_and_projector"),
    "dataset_path": honoured("data/test_rows.py::test_llava_row_becomes_messages_and_paths"),
    "image_root": honoured("data/test_rows.py::test_missing_image_root_and_splits_of_json_are_refused"),
    "datasets": honoured("data/test_rows.py::test_sources_are_mixed_by_weight_and_row_count"),
    "eval_datasets": honoured(
        "training/test_generation_check.py::test_losses_on_answers_and_questions_are_measured_on_rows_not_trained_on"
    ),
    "num_eval_rows": honoured("data/test_rows.py::test_held_out_rows_are_not_trained_on_in_any_copy"),
    "generation_datasets": honoured(
        "training/test_generation_check.py::test_generations_are_scored_written_and_sent_to_tensorboard"
    ),
    "vision_model_name_or_path": honoured(
        "training/test_training.py::test_stage_two_begins_with_the_logits_of_stage_one"
    ),
    "text_model_name_or_path": honoured(
        "training/test_training.py::test_stage_two_begins_with_the_logits_of_stage_one"
    ),
    "qformer_model_name_or_path": honoured(
        "training/test_recipes.py::test_tiny_twins_of_the_other_systems_train_what_they_say"
    ),
    "prototype_variant": honoured(
        "training/test_settings.py::test_architecture_of_a_model_from_parts_is_what_was_asked"
    ),
    "num_prototypes": honoured("training/test_settings.py::test_architecture_of_a_model_from_parts_is_what_was_asked"),
    "num_prototype_iterations": honoured(
        "training/test_settings.py::test_architecture_of_a_model_from_parts_is_what_was_asked"
    ),
    "projector_type": honoured("training/test_settings.py::test_architecture_of_a_model_from_parts_is_what_was_asked"),
    "image_aspect_ratio": honoured("model/test_processing.py::test_centre_crop_shows_the_middle_alone"),
    "prompt_layout": honoured("model/test_minigpt4.py::test_prompt_is_minigpt_4s_to_the_character"),
    "system_message": honoured("model/test_processing.py::test_a_setting_changed_at_loading_changes_the_template"),
    "self_question_ratio": honoured("training/test_collator.py::test_ratio_is_the_share_of_self_questions"),
    "question_loss_weight": honoured(
        "training/test_training.py::test_question_weight_zero_leaves_the_loss_of_the_answers"
    ),
    "vision_lr": honoured(
        "training/test_training.py::test_each_part_has_its_learning_rate_and_the_losses_are_logged_apart"
    ),
    "connector_lr": honoured(
        "training/test_training.py::test_each_part_has_its_learning_rate_and_the_losses_are_logged_apart"
    ),
    "vision_lora_r": honoured(
        "training/test_training.py::test_vision_lora_receives_gradient_in_every_layer_that_is_run"
    ),
    "vision_lora_alpha": honoured("training/test_settings.py::test_lora_that_would_be_scaled_otherwise_is_refused"),
    "vision_lora_dropout": honoured("training/test_settings.py::test_each_tower_has_its_own_dropout"),
    "init_lora_weights": honoured("training/test_settings.py::test_new_lora_of_each_initialisation_changes_no_logit"),
    "full_finetuning": honoured(
        "training/test_full_finetuning.py::test_all_of_language_model_and_projector_is_trained_and_nothing_of_the_tower"
    ),
    "resume": honoured(
        "training/test_recovery.py::test_run_killed_in_its_base_a_step_and_a_save_equals_the_uninterrupted_one"
    ),
    "global_batch_size": honoured("training/test_planning.py::test_global_batch_is_made_of_accumulated_ones"),
    "dry_run": honoured("training/test_planning.py::test_dry_run_takes_the_longest_rows_and_leaves_nothing"),
    "num_gpus": honoured("training/test_planning.py::test_number_of_gpus_belongs_to_a_plan"),
    "doctor": honoured("doctor/test_check.py::test_training_goes_on_with_the_doctor_off_or_warnings_only"),
    "max_loss": honoured("training/test_step_watch.py::test_diverging_loss_stops_the_run"),
}

MODEL = {
    "model_name_or_path": honoured("training/test_training.py::test_stage_two_begins_with_the_logits_of_stage_one"),
    "model_revision": refused(
        "An adapter does not remember the revision of its base. Run `hf download ORG/NAME --revision ... --local-dir "
        "FOLDER`, and give that folder"
    ),
    "dtype": honoured("training/test_full_finetuning.py::test_half_precision_base_is_trained_in_full_precision"),
    "attn_implementation": honoured("model/test_minigpt4.py::test_the_attention_that_is_asked_for_is_the_towers"),
    "use_peft": harmless(
        "LoRA is on wherever lora_r or vision_lora_r is above 0; beside full_finetuning it is refused."
    ),
    "lora_r": honoured("training/test_training.py::test_adapter_of_another_size_is_refused"),
    "lora_alpha": honoured("training/test_settings.py::test_lora_that_would_be_scaled_otherwise_is_refused"),
    "lora_dropout": honoured("training/test_settings.py::test_each_tower_has_its_own_dropout"),
    "lora_target_modules": honoured(
        "training/test_settings.py::test_dora_and_rslora_on_named_layers_are_trained_saved_merged_and_resumed_from"
    ),
    "lora_target_parameters": refused(
        "LoRA goes on linear layers here, not on bare parameters such as the experts of a mixture: name layers in "
        "lora_target_modules"
    ),
    "lora_modules_to_save": refused(
        "Extractor and projector are always trained whole, and TRL's loss reads the head past PEFT's copy of it. To "
        "train all of the language model, give full_finetuning true, lora_r 0 and vision_lora_r 0"
    ),
    "lora_task_type": refused("The model generates text, so there is one task only: leave it out"),
    "use_rslora": honoured(
        "training/test_settings.py::test_dora_and_rslora_on_named_layers_are_trained_saved_merged_and_resumed_from"
    ),
    "use_dora": honoured(
        "training/test_settings.py::test_dora_and_rslora_on_named_layers_are_trained_saved_merged_and_resumed_from"
    ),
    "load_in_8bit": honoured("inference/test_quantized.py::test_towers_are_quantized_and_connector_and_head_are_not"),
    "load_in_4bit": honoured("inference/test_quantized.py::test_towers_are_quantized_and_connector_and_head_are_not"),
    "bnb_4bit_quant_type": honoured("training/test_settings.py::test_settings_of_four_bits_reach_bitsandbytes"),
    "use_bnb_nested_quant": honoured("training/test_settings.py::test_settings_of_four_bits_reach_bitsandbytes"),
    "bnb_4bit_quant_storage": honoured("training/test_settings.py::test_settings_of_four_bits_reach_bitsandbytes"),
}

SFT = {
    "model_init_kwargs": refused(
        "TRL uses it for a model that it loads itself: give dtype, attn_implementation or load_in_4bit instead"
    ),
    "trust_remote_code": refused(
        "Towers and language models are those of transformers, without other code: leave it out"
    ),
    "router_aux_loss_coef": TRAINER,
    "chat_template_path": refused(
        "The chat template is written from the processor's settings, since it marks what is in the loss, which turns "
        "ask, and where images stand: give prompt_layout and system_message instead"
    ),
    "dataset_text_field": refused(CONVERSATIONS),
    "dataset_kwargs": refused(CONVERSATIONS, {"skip_prepare_dataset": True}),
    "dataset_num_proc": refused(
        "Rows are prepared in the workers of the data loader: give dataloader_num_workers instead"
    ),
    "eos_token": honoured(
        "training/test_settings.py::test_eos_token_ends_answers_in_training_and_in_the_merged_model"
    ),
    "max_length": honoured("training/test_collator.py::test_long_row_loses_whole_last_turns"),
    "truncation_mode": refused("A row that is too long loses whole turns from its end, never an image: leave it out"),
    "shuffle_dataset": refused("Each epoch has an order of its own (train_sampling_strategy random): leave it out"),
    "packing": honoured(
        "training/test_packed_training.py::test_packed_step_has_the_loss_and_gradients_of_the_padded_one"
    ),
    "packing_strategy": refused("Packing keeps rows whole here: leave it out"),
    "padding_free": refused("Not done for images. Leave it out; packing: true leaves hardly any padding"),
    "eval_packing": refused("Evaluation batches stay padded: leave it out", False),
    "pad_to_multiple_of": honoured(
        "training/test_settings.py::test_batches_are_padded_to_a_multiple_without_another_loss"
    ),
    "completion_only_loss": refused(
        "The loss is on what the model says, answers and self-questions, and on nothing else: leave it out", True
    ),
    "assistant_only_loss": harmless("The loss is always on what the model says: answers and self-questions."),
    "loss_type": honoured("training/test_settings.py::test_dynamic_fine_tuning_weighs_each_token_by_its_probability"),
    "activation_offloading": honoured("training/test_settings.py::test_activations_are_offloaded_on_a_gpu"),
    "pad_token": refused("The tokenizer's own padding token is used, or <pad> where it has none: leave it out"),
}

TRAINING = {
    "output_dir": TRAINER,
    "per_device_train_batch_size": TRAINER,
    "num_train_epochs": TRAINER,
    "max_steps": TRAINER,
    "learning_rate": honoured(
        "training/test_training.py::test_each_part_has_its_learning_rate_and_the_losses_are_logged_apart"
    ),
    "lr_scheduler_type": TRAINER,
    "lr_scheduler_kwargs": TRAINER,
    "warmup_steps": honoured("training/test_planning.py::test_planned_steps_are_those_of_the_run"),
    "optim": TRAINER,
    "optim_args": TRAINER,
    "weight_decay": TRAINER,
    "adam_beta1": TRAINER,
    "adam_beta2": TRAINER,
    "adam_epsilon": TRAINER,
    "optim_target_modules": refused(
        "It is for optimizers of whole weight matrices (GaLore, APOLLO), which do not go with a learning rate for "
        "each part of the model: leave it out, and choose another optim"
    ),
    "gradient_accumulation_steps": honoured(
        "training/test_training.py::test_accumulated_batches_equal_one_large_batch_with_weighted_questions"
    ),
    "average_tokens_across_devices": refused(
        "The loss is always the mean over the tokens of all processes, whatever their number: leave it out"
    ),
    "max_grad_norm": TRAINER,
    "label_smoothing_factor": refused(
        "It needs all logits, which TRL's fused head never makes (TRL gives it up too): leave it out"
    ),
    "bf16": honoured("training/test_lm_head.py::test_autocast_and_gradient_checkpointing_leave_the_loss_as_it_is"),
    "fp16": TRAINER,
    "bf16_full_eval": refused(FULL_EVALUATION),
    "fp16_full_eval": refused(FULL_EVALUATION),
    "tf32": TRAINER,
    "activation_checkpointing": honoured(
        "training/test_lm_head.py::test_gradient_checkpointing_computes_the_layers_of_both_towers_again"
    ),
    "activation_checkpointing_kwargs": TRAINER,
    "gradient_checkpointing": honoured(
        "training/test_lm_head.py::test_gradient_checkpointing_computes_the_layers_of_both_towers_again"
    ),
    "gradient_checkpointing_kwargs": TRAINER,
    "torch_compile": TRAINER,
    "torch_compile_backend": TRAINER,
    "torch_compile_mode": TRAINER,
    "use_liger_kernel": refused(LIGER),
    "liger_kernel_config": refused(LIGER),
    "use_cache": refused("A training step has no use for a cache, and generation has its own: leave it out"),
    "neftune_noise_alpha": honoured("training/test_settings.py::test_noise_on_embeddings_is_there_in_training_alone"),
    "torch_empty_cache_steps": TRAINER,
    "auto_find_batch_size": refused(
        "A smaller batch would change the rows of a step in the middle of a run: `--dry_run real` says what fits"
    ),
    "logging_strategy": TRAINER,
    "logging_steps": TRAINER,
    "logging_first_step": TRAINER,
    "log_on_each_node": TRAINER,
    "logging_nan_inf_filter": harmless("Always off: a step whose loss is not finite is refused, and never hidden."),
    "include_num_input_tokens_seen": honoured(
        "training/test_settings.py::test_trainer_counts_tokens_and_keeps_the_best_model"
    ),
    "log_level": TRAINER,
    "log_level_replica": TRAINER,
    "disable_tqdm": TRAINER,
    "report_to": honoured(
        "training/test_generation_check.py::test_generations_are_scored_written_and_sent_to_tensorboard"
    ),
    "run_name": TRAINER,
    "project": TRAINER,
    "trackio_space_id": TRAINER,
    "trackio_bucket_id": TRAINER,
    "trackio_static_space_id": TRAINER,
    "eval_strategy": honoured(
        "training/test_generation_check.py::test_data_to_evaluate_on_without_a_time_for_it_is_refused"
    ),
    "eval_steps": TRAINER,
    "eval_delay": TRAINER,
    "per_device_eval_batch_size": TRAINER,
    "prediction_loss_only": harmless("An evaluation measures losses only, whatever it says."),
    "eval_on_start": TRAINER,
    "eval_do_concat_batches": refused(NO_PREDICTIONS),
    "eval_use_gather_object": refused(NO_PREDICTIONS),
    "eval_accumulation_steps": refused(NO_PREDICTIONS),
    "include_for_metrics": refused(NO_PREDICTIONS),
    "batch_eval_metrics": refused(NO_PREDICTIONS),
    "save_only_model": refused(
        "A checkpoint without the optimizer cannot be resumed, and would count as half-written. With save_strategy "
        "no, only the trained weights are saved, at the end"
    ),
    "save_strategy": TRAINER,
    "save_steps": TRAINER,
    "save_on_each_node": TRAINER,
    "save_total_limit": TRAINER,
    "enable_jit_checkpoint": refused("SIGTERM and SIGINT save a checkpoint without it: leave it out"),
    "push_to_hub": refused(PUSH),
    "hub_token": refused("Nothing is sent to the Hub in training; `sq-llava push` takes the token of `hf auth login`"),
    "hub_private_repo": refused(f"{PUSH}, with --private"),
    "hub_model_id": refused(PUSH),
    "hub_strategy": refused(PUSH),
    "hub_always_push": refused(PUSH),
    "hub_revision": refused(f"{PUSH}, with --revision"),
    "load_best_model_at_end": honoured(
        "training/test_settings.py::test_trainer_counts_tokens_and_keeps_the_best_model"
    ),
    "metric_for_best_model": honoured(
        "training/test_settings.py::test_trainer_counts_tokens_and_keeps_the_best_model"
    ),
    "greater_is_better": harmless("A lower loss is better, and nothing but losses and right answers is measured."),
    "ignore_data_skip": TRAINER,
    "restore_callback_states_from_checkpoint": TRAINER,
    "full_determinism": TRAINER,
    "seed": honoured("training/test_collator.py::test_draw_is_new_each_epoch_and_each_seed_but_repeatable"),
    "data_seed": TRAINER,
    "use_cpu": TRAINER,
    "accelerator_config": honoured("training/test_settings.py::test_setting_that_does_not_go_with_others_is_refused"),
    "parallelism_config": refused(
        "The loss needs whole sequences on each process, so there is no tensor, context or sequence parallelism: use "
        "recipes/accelerate/fsdp2.yaml or zero3.yaml"
    ),
    "dataloader_drop_last": TRAINER,
    "dataloader_num_workers": honoured(
        "training/test_collator.py::test_workers_draw_the_same_self_questions_in_every_epoch"
    ),
    "dataloader_pin_memory": TRAINER,
    "dataloader_persistent_workers": honoured(
        "training/test_collator.py::test_workers_draw_the_same_self_questions_in_every_epoch"
    ),
    "dataloader_prefetch_factor": TRAINER,
    "dataloader_multiprocessing_context": TRAINER,
    "dataloader_in_order": TRAINER,
    "remove_unused_columns": harmless("Always off: the collator makes the model's inputs of the columns."),
    "label_names": refused("The labels are made here, under their one name: leave it out"),
    "train_sampling_strategy": honoured(
        "training/test_recovery.py::test_rows_grouped_by_length_come_once_an_epoch_and_in_the_same_order_after_a_kill"
    ),
    "length_column_name": refused("Lengths are counted here, not read from a column: leave it out"),
    "ddp_find_unused_parameters": refused(
        "Every trained weight is in the graph of every batch, so there is nothing to find: leave it out", False
    ),
    "ddp_bucket_cap_mb": TRAINER,
    "ddp_broadcast_buffers": TRAINER,
    "ddp_static_graph": TRAINER,
    "ddp_backend": TRAINER,
    "ddp_timeout": TRAINER,
    "fsdp": TRAINER,
    "fsdp_config": TRAINER,
    "deepspeed": TRAINER,
    "debug": TRAINER,
    "skip_memory_metrics": TRAINER,
    "do_train": harmless("Training is all that the script does."),
    "do_eval": honoured("training/test_settings.py::test_setting_that_does_not_go_with_others_is_refused"),
    "do_predict": refused("Nothing is predicted after training: run `sq-llava evaluate`"),
    "resume_from_checkpoint": honoured("training/test_training.py::test_resumed_run_equals_uninterrupted_run"),
    "local_rank": harmless("The launcher sets it."),
}

TABLE = {"SQ-LLaVA": OURS, "TRL's ModelConfig": MODEL, "TRL's SFTConfig": SFT, "TrainingArguments": TRAINING}
SETTINGS = {name: setting for section in TABLE.values() for name, setting in section.items()}
# Fields that only some of the supported versions of transformers and TRL have.
NOT_IN_ALL_VERSIONS = {"activation_checkpointing", "activation_checkpointing_kwargs"}


def is_given(config: Any, name: str) -> bool:
    """Whether a setting differs from its default."""
    (field,) = (field for field in fields(config) if field.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(config, name) != default


def refuse_settings(*configs: Any) -> None:
    """
    Raises:
        ValueError: for a setting that is refused, if it is given.
    """
    for config in configs:
        for field in fields(config):
            setting = SETTINGS.get(field.name)
            if setting is None or setting.verdict != "refused" or not is_given(config, field.name):
                continue
            value = getattr(config, field.name)
            if value not in setting.values:
                shown = "given" if field.name == "hub_token" else repr(getattr(value, "value", value))
                raise ValueError(f"{field.name} is {shown}, which is not supported. {setting.note}.")


def render() -> str:
    """The table in Markdown."""
    lines = [
        "# Settings",
        "",
        "All settings of `train_sft.py`, in a recipe or on the command line. *Honoured*: it does what it says, as the "
        "named test shows, or as the Trainer does it. *Harmless*: the run is the one that was asked for, whatever the "
        "value. *Refused*: another value than its default stops the run before any model is loaded.",
        "",
        "Written by `python -m sq_llava.training.setting_table > docs/settings.md`.",
    ]
    for title, section in TABLE.items():
        lines += ["", f"## {title}", "", "| setting | | |", "|---|---|---|"]
        for name, setting in section.items():
            note = setting.note
            if setting.verdict == "honoured":
                note = f"`tests/{note}`" if note else "by the Trainer"
            if setting.values:
                note += f" (taken: {', '.join(f'`{value!r}`' for value in setting.values)})"
            lines.append(f"| `{name}` | {setting.verdict} | {note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")

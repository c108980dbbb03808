"""One table of all settings: supported, without effect, or refused. Errors and docs/settings.md are made from it.

    python -m sq_llava.training.setting_table > docs/settings.md

It contains every field of `SQLlavaArguments`, of TRL's `ModelConfig` and `SFTConfig`, and of transformers'
`TrainingArguments`. It does not check combinations of settings; `sq_llava/training/settings.py` does that.
"""

from dataclasses import MISSING, dataclass, fields
from textwrap import wrap
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        verdict: `"supported"`: the setting does what it says. `"no effect"`: every value gives the same, correct run.
            `"refused"`: the setting would do nothing, or something else than it says, so it raises an error.
        note (`str`): For a supported setting, the test that proves it (empty if the Trainer handles it alone). For a
            setting without effect, the reason. For a refused setting, the reason and what to do instead.
        values (`tuple`): Values of a refused setting that are accepted besides its default, because they ask for what
            is done anyway.
    """

    verdict: Literal["supported", "no effect", "refused"]
    note: str = ""
    values: tuple = ()


def supported(test: str) -> Setting:
    return Setting("supported", test)


def no_effect(reason: str) -> Setting:
    return Setting("no effect", reason)


def refused(reason: str, *values: Any) -> Setting:
    return Setting("refused", reason, values)


def each(names: str, setting: Setting) -> dict[str, Setting]:
    """The same entry for several settings."""
    return dict.fromkeys(names.split(), setting)


# Handled by the Trainer, accelerate or PyTorch; this project does not touch it.
TRAINER = Setting("supported")
PUSH = (
    "Training does not push to the Hub: others could not load its output_dir. Run `sq-llava push OUTPUT_DIR ORG/NAME`"
)
NO_PREDICTIONS = "Evaluation measures losses and generates answers, but collects no predictions for metrics: remove it"
LIGER = "Liger has no kernels for the model type sq_llava and would change nothing: remove it"
FULL_EVALUATION = "The Trainer uses it only outside of training, where this project does not evaluate: remove it"
CONVERSATIONS = "Rows are conversations in a known format, prepared batch by batch: remove it"

OURS = {
    "stage": supported("training/test_training.py::test_stage_one_trains_vision_lora_extractor_and_projector"),
    "dataset_path": supported("data/test_rows.py::test_llava_row_becomes_messages_and_paths"),
    "image_root": supported("data/test_rows.py::test_missing_image_root_and_splits_of_json_are_refused"),
    "datasets": supported("data/test_rows.py::test_sources_are_mixed_by_weight_and_row_count"),
    "eval_datasets": supported(
        "training/test_generation_check.py::test_losses_on_answers_and_questions_are_measured_on_rows_not_trained_on"
    ),
    "num_eval_rows": supported("data/test_rows.py::test_held_out_rows_are_not_trained_on_in_any_copy"),
    "generation_datasets": supported(
        "training/test_generation_check.py::test_generations_are_scored_written_and_sent_to_tensorboard"
    ),
    "text_probe": supported(
        "training/test_text_probe.py::test_loss_on_text_is_measured_before_the_first_step_and_after_the_last"
    ),
    **each(
        "vision_model_name_or_path text_model_name_or_path",
        supported("training/test_training.py::test_stage_two_begins_with_the_logits_of_stage_one"),
    ),
    "qformer_model_name_or_path": supported(
        "training/test_recipes.py::test_tiny_twins_of_the_other_systems_train_what_they_say"
    ),
    **each(
        "prototype_variant num_prototypes num_prototype_iterations projector_type",
        supported("training/test_settings.py::test_model_from_parts_has_the_requested_architecture"),
    ),
    "image_aspect_ratio": supported("model/test_image_shapes.py::test_centre_crop_shows_only_the_middle"),
    "prompt_layout": supported(
        "training/test_prompt_layouts.py::test_stage_two_is_trained_on_answers_and_questions_of_the_models_own_layout"
    ),
    "system_message": supported("model/test_processing.py::test_a_setting_changed_at_loading_changes_the_template"),
    "self_question_ratio": supported("training/test_collator.py::test_ratio_is_the_share_of_self_questions"),
    "question_loss_weight": supported(
        "training/test_training.py::test_question_weight_zero_leaves_only_the_loss_of_the_answers"
    ),
    **each(
        "vision_lr connector_lr",
        supported("training/test_training.py::test_each_part_has_its_learning_rate_and_the_losses_are_logged_apart"),
    ),
    "vision_lora_r": supported(
        "training/test_training.py::test_vision_lora_receives_gradient_in_every_layer_that_is_run"
    ),
    "vision_lora_alpha": supported("training/test_settings.py::test_lora_of_another_scale_is_refused"),
    "vision_lora_dropout": supported("training/test_settings.py::test_each_tower_has_its_own_dropout"),
    "init_lora_weights": supported("training/test_settings.py::test_new_lora_of_each_initialisation_changes_no_logit"),
    "full_finetuning": supported(
        "training/test_full_finetuning.py::test_all_of_language_model_and_projector_is_trained_and_nothing_of_the_tower"
    ),
    "resume": supported(
        "training/test_recovery.py::test_run_killed_in_setup_step_and_save_equals_the_uninterrupted_one"
    ),
    "global_batch_size": supported("training/test_planning.py::test_global_batch_is_made_by_accumulation"),
    "dry_run": supported("training/test_planning.py::test_dry_run_takes_the_longest_rows_and_leaves_nothing"),
    "num_gpus": supported("training/test_planning.py::test_number_of_gpus_is_refused_without_a_plan"),
    "doctor": supported("doctor/test_check.py::test_training_continues_with_the_doctor_off_or_warnings_only"),
    "max_loss": supported("training/test_step_watch.py::test_loss_above_max_loss_stops_the_run"),
    **each(
        "share_images max_rows_per_image",
        supported("training/test_shared_images.py::test_losses_and_gradients_are_those_of_the_rows_alone"),
    ),
}

MODEL = {
    "model_name_or_path": supported("training/test_training.py::test_stage_two_begins_with_the_logits_of_stage_one"),
    "model_revision": refused(
        "An adapter does not store the revision of its base. Run `hf download ORG/NAME --revision REVISION "
        "--local-dir FOLDER`, and set model_name_or_path to that folder"
    ),
    "dtype": supported("training/test_full_finetuning.py::test_half_precision_base_is_trained_in_full_precision"),
    "attn_implementation": supported("model/test_minigpt4.py::test_the_vision_tower_uses_the_requested_attention"),
    "use_peft": no_effect(
        "LoRA is used if lora_r or vision_lora_r is above 0. Together with full_finetuning, use_peft is refused."
    ),
    "lora_r": supported("training/test_training.py::test_adapter_of_another_size_is_refused"),
    "lora_alpha": supported("training/test_settings.py::test_lora_of_another_scale_is_refused"),
    "lora_dropout": supported("training/test_settings.py::test_each_tower_has_its_own_dropout"),
    **each(
        "lora_target_modules use_rslora use_dora",
        supported(
            "training/test_settings.py::test_dora_and_rslora_on_named_layers_are_trained_saved_merged_and_resumed_from"
        ),
    ),
    "lora_target_parameters": refused(
        "LoRA is only added to linear layers, not to bare parameters such as stacked experts: name linear layers in "
        "lora_target_modules"
    ),
    "lora_modules_to_save": refused(
        "All weights of extractor and projector are always trained, and TRL's loss bypasses PEFT's copy of the head. "
        "To train all of the language model, set full_finetuning true, lora_r 0 and vision_lora_r 0"
    ),
    "lora_task_type": refused("The only task is text generation: remove it"),
    **each(
        "load_in_8bit load_in_4bit",
        supported("inference/test_quantized.py::test_towers_are_quantized_and_connector_and_head_are_not"),
    ),
    **each(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        supported("training/test_settings.py::test_settings_of_four_bits_reach_bitsandbytes"),
    ),
}

SFT = {
    "model_init_kwargs": refused(
        "TRL only uses it for a model that it loads itself: set dtype, attn_implementation or load_in_4bit instead"
    ),
    "trust_remote_code": refused(
        "Vision towers and language models come from transformers, without remote code: remove it"
    ),
    "router_aux_loss_coef": TRAINER,
    "chat_template_path": supported("training/test_prompt_layouts.py::test_users_template_is_trained_with_and_saved"),
    "dataset_text_field": refused(CONVERSATIONS),
    "dataset_kwargs": refused(CONVERSATIONS, {"skip_prepare_dataset": True}),
    "dataset_num_proc": refused("Rows are prepared in the dataloader workers: set dataloader_num_workers instead"),
    "eos_token": supported(
        "training/test_settings.py::test_eos_token_ends_answers_in_training_and_in_the_merged_model"
    ),
    "max_length": supported("training/test_collator.py::test_long_row_loses_whole_last_turns"),
    "truncation_mode": refused("Rows that are too long are always cut at the end, by whole exchanges: remove it"),
    "shuffle_dataset": refused("Each epoch is shuffled anyway (train_sampling_strategy random): remove it"),
    "packing": supported(
        "training/test_packed_training.py::test_packed_step_has_the_loss_and_gradients_of_the_padded_one"
    ),
    "packing_strategy": refused("Packing never cuts rows: remove it"),
    "padding_free": refused("It does not work with images. Set packing true instead, which leaves little padding"),
    "eval_packing": refused("Evaluation batches are never packed: remove it", False),
    "pad_to_multiple_of": supported("training/test_settings.py::test_padding_to_a_multiple_does_not_change_the_loss"),
    "completion_only_loss": refused(
        "The loss is always on answers and self-questions, and on nothing else: remove it", True
    ),
    "assistant_only_loss": no_effect("The loss is always on answers and self-questions only."),
    "loss_type": supported("training/test_settings.py::test_dynamic_fine_tuning_weighs_each_token_by_its_probability"),
    "activation_offloading": supported("training/test_settings.py::test_activations_are_offloaded_on_a_gpu"),
    "pad_token": refused("The tokenizer's padding token is used, or `<pad>` if it has none: remove it"),
}

TRAINING = {
    **each(
        "output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type "
        "lr_scheduler_kwargs optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
        "fp16 tf32 activation_checkpointing_kwargs gradient_checkpointing_kwargs torch_compile "
        "torch_compile_backend torch_compile_mode torch_empty_cache_steps logging_strategy logging_steps "
        "logging_first_step log_on_each_node log_level log_level_replica disable_tqdm run_name project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id eval_steps eval_delay "
        "per_device_eval_batch_size eval_on_start save_strategy save_steps save_on_each_node save_total_limit "
        "ignore_data_skip restore_callback_states_from_checkpoint full_determinism data_seed use_cpu "
        "dataloader_drop_last dataloader_pin_memory dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics",
        TRAINER,
    ),
    "learning_rate": supported(
        "training/test_training.py::test_each_part_has_its_learning_rate_and_the_losses_are_logged_apart"
    ),
    "warmup_steps": supported("training/test_planning.py::test_planned_steps_are_those_of_the_run"),
    "optim_target_modules": refused(
        "It is for GaLore and APOLLO optimizers, which cannot have a learning rate for each part of the model: remove "
        "it, and choose another optim"
    ),
    "gradient_accumulation_steps": supported(
        "training/test_training.py::test_accumulated_batches_equal_one_large_batch_with_weighted_questions"
    ),
    "average_tokens_across_devices": refused(
        "The loss is always the mean over the tokens of all processes: remove it"
    ),
    "label_smoothing_factor": refused(
        "It needs all logits, which TRL's fused head never computes (TRL ignores it too): remove it"
    ),
    "bf16": supported("training/test_lm_head.py::test_autocast_and_gradient_checkpointing_do_not_change_the_loss"),
    **each("bf16_full_eval fp16_full_eval", refused(FULL_EVALUATION)),
    **each(
        "activation_checkpointing gradient_checkpointing",
        supported("training/test_lm_head.py::test_gradient_checkpointing_computes_the_layers_of_both_towers_again"),
    ),
    **each("use_liger_kernel liger_kernel_config", refused(LIGER)),
    "use_cache": refused("Training needs no cache, and generation always uses its own: remove it"),
    "neftune_noise_alpha": supported("training/test_settings.py::test_noise_on_embeddings_is_added_only_in_training"),
    "auto_find_batch_size": refused(
        "A smaller batch would change the rows of each step during a run. Remove it, and use `--dry_run real` to see "
        "what fits"
    ),
    "logging_nan_inf_filter": no_effect("Always off: a step whose loss is not finite stops the run."),
    **each(
        "include_num_input_tokens_seen load_best_model_at_end metric_for_best_model",
        supported("training/test_settings.py::test_trainer_counts_tokens_and_keeps_the_best_model"),
    ),
    "report_to": supported(
        "training/test_generation_check.py::test_generations_are_scored_written_and_sent_to_tensorboard"
    ),
    "prediction_loss_only": no_effect("Evaluation never collects predictions."),
    **each(
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics",
        refused(NO_PREDICTIONS),
    ),
    "save_only_model": refused(
        "A checkpoint without the optimizer cannot be resumed and would count as half-written. Set save_strategy no "
        "to save only the trained weights, at the end"
    ),
    "enable_jit_checkpoint": refused("SIGTERM and SIGINT save a checkpoint anyway: remove it"),
    **each("push_to_hub hub_model_id hub_strategy hub_always_push", refused(PUSH)),
    "hub_token": refused("Training does not push to the Hub. `sq-llava push` uses the token of `hf auth login`"),
    "hub_private_repo": refused(f"{PUSH}, with --private"),
    "hub_revision": refused(f"{PUSH}, with --revision"),
    "greater_is_better": no_effect("Set from metric_for_best_model: false for a loss, true for accuracy."),
    "seed": supported("training/test_collator.py::test_draw_is_new_each_epoch_and_each_seed_but_repeatable"),
    **each(
        "accelerator_config do_eval eval_strategy",
        supported("training/test_settings.py::test_settings_that_do_not_work_together_are_refused"),
    ),
    "parallelism_config": refused(
        "The loss needs whole sequences in each process, so tensor, context and sequence parallelism do not work: use "
        "recipes/accelerate/fsdp2.yaml, hsdp.yaml or zero3.yaml"
    ),
    **each(
        "dataloader_num_workers dataloader_persistent_workers",
        supported("training/test_collator.py::test_workers_draw_the_same_self_questions_in_every_epoch"),
    ),
    "remove_unused_columns": no_effect("Always off: the collator makes the model's inputs from the columns."),
    "label_names": refused("The collator makes the labels, and their name is fixed: remove it"),
    "train_sampling_strategy": supported(
        "training/test_recovery.py::test_rows_grouped_by_length_come_once_an_epoch_and_in_the_same_order_after_a_kill"
    ),
    "length_column_name": refused("Lengths are computed, not read from a column: remove it"),
    "ddp_find_unused_parameters": refused(
        "Every batch uses every trained weight, so it is always off: remove it", False
    ),
    "do_train": no_effect("The script always trains."),
    "do_predict": refused("Training does not predict. Run `sq-llava evaluate` afterwards"),
    "resume_from_checkpoint": supported("training/test_training.py::test_resumed_run_equals_uninterrupted_run"),
    "local_rank": no_effect("The launcher sets it."),
}

TABLE = {"SQ-LLaVA": OURS, "TRL's ModelConfig": MODEL, "TRL's SFTConfig": SFT, "TrainingArguments": TRAINING}
SETTINGS = {name: setting for section in TABLE.values() for name, setting in section.items()}
# Fields that exist only in some of the supported versions of transformers and TRL.
NOT_IN_ALL_VERSIONS = {"activation_checkpointing", "activation_checkpointing_kwargs"}


def is_given(config: Any, name: str) -> bool:
    """Whether a setting differs from its default."""
    (field,) = (field for field in fields(config) if field.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(config, name) != default


def refuse_settings(*configs: Any) -> None:
    """
    Raises:
        ValueError: for a refused setting whose value is neither its default nor accepted.
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
        "These are all settings of a recipe or of the command line. `python -m train_sft --help` explains them.",
        "",
        "- *supported*: the setting does what it says. The linked file has a test of it, or the Trainer handles it.",
        "- *no effect*: every value gives the same, correct run.",
        "- *refused*: any value but the default (or an accepted value) stops the run before a model is loaded.",
        "",
        "This page is generated by `python -m sq_llava.training.setting_table > docs/settings.md`.",
    ]
    for title, section in TABLE.items():
        if section is OURS:
            lines += ["", f"## {title}", "", *_own_rows()]
            continue
        names: dict[str, list[str]] = {}
        for name, setting in section.items():
            names.setdefault(_describe(setting), []).append(f"`{name}`")
        by_trainer = names.pop(_describe(TRAINER), None)
        lines += ["", f"## {title}", "", "| setting | status |", "|---|---|"]
        lines += [f"| {', '.join(same)} | {description} |" for description, same in names.items()]
        if by_trainer:
            lines += ["", "Supported, and handled by the Trainer:", "", *wrap(", ".join(by_trainer), 119)]
    return "\n".join(lines) + "\n"


def _own_rows() -> list[str]:
    """A table of this project's own settings, with their defaults and their texts in `--help`."""
    from sq_llava.training.settings import SQLlavaArguments  # which imports this module

    lines = ["| setting | default | meaning | status |", "|---|---|---|---|"]
    for field in fields(SQLlavaArguments):
        if field.name in OURS:
            default = "" if field.default in (None, MISSING) else f"`{field.default}`".replace("False", "false")
            meaning = field.metadata["help"].replace("|", r"\|")
            lines.append(f"| `{field.name}` | {default} | {meaning} | {_describe(OURS[field.name])} |")
    return lines


def _describe(setting: Setting) -> str:
    if setting.verdict == "supported":
        return f"supported ([test](../tests/{setting.note.partition('::')[0]}))"
    values = f" (accepted: {', '.join(f'`{value!r}`' for value in setting.values)})" if setting.values else ""
    return f"*{setting.verdict}*: {setting.note}{values}"


if __name__ == "__main__":
    print(render(), end="")

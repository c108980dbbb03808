"""TRL's SFTTrainer plus what SQ-LLaVA needs: a learning rate for each part of the model, and a weighted loss.

The loss of an optimizer step is the weighted mean over all its labelled tokens, over all accumulation steps and
processes. An answer token has weight 1, a self-question token `question_loss_weight` (1 in the paper). A language
model with experts adds its load-balancing loss times `router_aux_loss_coef` (from the settings, or its config.json).

Logged besides the loss:

- `loss_answers`, `loss_questions`: the unweighted means over answer tokens and over self-question tokens
- `mean_token_accuracy`
- `self_question_share`: the share of self-questions among the turns that the model says
- `packing_fill`, with packing: the share of the packs' capacity that holds tokens
- `aux_loss`, with experts
- the learning rates

Each step is checked before it is applied (`sq_llava/training/recovery.py`). With a single process, an error first
saves the steps since the last checkpoint.
"""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from rich.filesize import decimal
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from sq_llava.checkpoints.completeness import RUN_FILE, STATE_FILE, checkpoint_faults, file_sizes
from sq_llava.checkpoints.load import without_adapter
from sq_llava.data.self_questions import ANSWER, IGNORE_INDEX, QUESTION
from sq_llava.output import full_disk_named, sync, write_json, written_whole
from sq_llava.training.adapter import trained_parameters
from sq_llava.training.generation_check import GenerationCheck
from sq_llava.training.length_sampler import ModalityLengthSampler
from sq_llava.training.packing import PackedRows, PackingCollator, PackSampler, pack_sampler, require_separation
from sq_llava.training.recovery import HALF_WRITTEN_MODEL, CheckpointError, StepWatch, place_model
from sq_llava.training.sharding import embeddings_in_the_root_unit, own_class, sharding_of, wrap_layers
from sq_llava.training.shared_prefix import attention_mask, register_shared_prefix
from sq_llava.training.text_probe import TextProbe, TextProbeCallback


def in_precision(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Casts floating-point weights to another precision. Weights that share memory, such as a tied head, still do."""
    cast: dict[int, torch.Tensor] = {}
    for weight in state_dict.values():
        if weight.data_ptr() not in cast:
            cast[weight.data_ptr()] = weight.to(dtype) if weight.is_floating_point() else weight
    return {name: cast[weight.data_ptr()] for name, weight in state_dict.items()}


def require_router_loss(text_config) -> None:
    """
    Raises:
        ValueError: if the router loss of a language model with experts cannot be computed from its configuration.
    """
    missing = [name for name in ("num_experts", "num_experts_per_tok") if getattr(text_config, name, None) is None]
    if missing:
        raise ValueError(
            f"The configuration of the language model ({text_config.model_type}) has no {' and no '.join(missing)}: "
            "its router loss cannot be computed. Set router_aux_loss_coef to 0 to train without it."
        )


class SQLlavaTrainer(SFTTrainer):
    """
    Trains a stage of SQ-LLaVA.

    Args:
        question_loss_weight (`float`): Weight of a self-question token; an answer token has weight 1.
        part_learning_rates (`dict[str, float]`): Learning rates of `"vision"` and `"connector"`. Other parts use
            `learning_rate`.
        max_loss (`float`, *optional*): Stop at a step with a higher loss. Default: twice the loss that the run began
            with ([`StepWatch.highest_loss`]).
        generation_check (`GenerationCheck`, *optional*): Runs with each evaluation.
        text_probe (`TextProbe`, *optional*): Runs before and after training, and with each evaluation.
        packing (`bool`): Whether to pack training rows. Their `length` must then come from `with_length_bounds`.
        max_rows_per_image (`int`): With packing, the most rows that share the pass over their image. 1 for no sharing.
        args, kwargs: As for [`~trl.SFTTrainer`]. The data collator must be a [`SelfQuestioningCollator`].
    """

    _tag_names = ["trl", "sft", "sq-llava"]

    def __init__(
        self,
        *args,
        question_loss_weight: float,
        part_learning_rates: dict[str, float],
        max_loss: float | None = None,
        generation_check: GenerationCheck | None = None,
        text_probe: TextProbe | None = None,
        packing: bool = False,
        max_rows_per_image: int = 1,
        **kwargs,
    ):
        self.max_rows_per_image = max_rows_per_image
        self.question_loss_weight = question_loss_weight
        self.part_learning_rates = part_learning_rates
        self.generation_check, self.text_probe = generation_check, text_probe
        self._sums: dict[str, torch.Tensor] = {}
        self._aux_losses: dict[str, list[torch.Tensor]] = {}
        self._num_eval_rows = 0
        self._init_trl(*args, **kwargs)
        self.args.logging_nan_inf_filter = False  # it would log another number where the loss is nan
        vocab_size = self.model.config.get_text_config().vocab_size
        self.watch = StepWatch(self.accelerator, vocab_size, max_loss)
        self.add_callback(self.watch)
        if text_probe is not None:
            # First in the list: at the end of training, trackers take no values any more.
            self.callback_handler.callbacks.insert(0, TextProbeCallback(text_probe, self))
        # Tokens in packs, and the capacity of those packs, since the last log line.
        self._packed = torch.zeros(2)
        self.packs = self._make_packs() if packing else None
        if self.is_fsdp_enabled:
            wrap_layers(self.accelerator.state.fsdp_plugin, self.model)

    def _init_trl(self, *args, model, **kwargs) -> None:
        """Initialises TRL's trainer, and reverts what it changes in the model."""
        trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        text_config = model.config.get_text_config()
        returns_router_logits = getattr(text_config, "output_router_logits", None)
        super().__init__(*args, model=model, **kwargs)
        if self.aux_loss_enabled:
            require_router_loss(text_config)
            # TRL turns this on in the config, also for generating and saving. `compute_loss` passes it instead.
            text_config.output_router_logits = returns_router_logits
        # TRL casts the trained weights of a quantized model to bfloat16, which rounds small updates away.
        for parameter, data in trained.items():
            parameter.data = data.to(parameter.device)

    def _make_packs(self) -> PackSampler:
        language_model = without_adapter(self.model).model.language_model
        if not is_deepspeed_zero3_enabled():
            require_separation(language_model, self._shares_images)
        if self._shares_images and self._is_flat:
            register_shared_prefix(language_model.config._attn_implementation)
        epoch = self.data_collator.epoch
        return pack_sampler(self.train_dataset, self.args, self.args.world_size, epoch, self.max_rows_per_image)

    @property
    def _shares_images(self) -> bool:
        return self.max_rows_per_image > 1

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Creates the Trainer's optimizer, and splits its parameter groups by part of the model."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        parts = trained_parameters(self.model if model is None else model)
        part_of = {parameter: part for part, parameters in parts.items() for _, parameter in parameters}
        groups = [
            {**group, "params": members, "lr": self.part_learning_rates.get(part, group["lr"]), "part": part}
            for group in optimizer.param_groups
            for part in parts
            if (members := [parameter for parameter in group["params"] if part_of[parameter] == part])
        ]
        assert sum(len(group["params"]) for group in groups) == len(part_of), "a trained parameter is in no group"
        optimizer.param_groups = groups
        return optimizer

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        """With `train_sampling_strategy="group_by_length"`, groups rows by modality too."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = (train_dataset or self.train_dataset).with_format("numpy", columns=["length", "num_images"])[:]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ModalityLengthSampler(
            rows["length"], rows["num_images"], batch_size, self.args.seed, self.data_collator.epoch
        )

    @property
    def _is_flat(self) -> bool:
        # The name of every FlashAttention implementation in transformers contains "flash".
        return "flash" in self.model.config.get_text_config()._attn_implementation

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        if self.packs is None:
            return super().get_train_dataloader()
        args = self.args
        loader = torch.utils.data.DataLoader(
            PackedRows(self.train_dataset),
            batch_sampler=self.packs,
            collate_fn=PackingCollator(self.data_collator, self._is_flat, self._shares_images),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset=None) -> torch.utils.data.DataLoader:
        """Always uses the self-questions of the first epoch, so that evaluations can be compared."""
        collator = self.data_collator
        self.data_collator = replace(collator, epoch=torch.zeros_like(collator.epoch))
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        probed = {} if self.text_probe is None else self.text_probe.run(self)
        self._num_eval_rows = len(dataloader.dataset)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._num_eval_rows = 0
        found = self.collect_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        output.metrics.update(probed)
        if self.generation_check is not None:
            output.metrics.update(self.generation_check.run(self))
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        self._ignore_repeated_rows(inputs, self._num_eval_rows, self.args.eval_batch_size)  # not in a text probe
        if "pixel_values" not in inputs and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            # Sharded processes gather weights in one order, so a text-only batch needs an image too. No row shows it.
            blank = torch.zeros(1, 3, *[self.model.config.vision_config.image_size] * 2)
            inputs = inputs | {"pixel_values": blank, "image_indices": torch.zeros(0, dtype=torch.int64)}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _loss_weights(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Weights of the next-token losses, `(batch_size, sequence_length - 1)`; 0 at positions without a label."""
        kinds = batch["turn_kinds"][:, 1:]
        return (kinds == ANSWER).float() + self.question_loss_weight * (kinds == QUESTION).float()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """The sum of the weights over all accumulation steps, and over all processes."""
        if batch_samples and self.packs is None:
            self._ignore_repeated_rows(batch_samples[-1], len(self.train_dataset), self._train_batch_size)
        weight = sum((self._loss_weights(batch).sum() for batch in batch_samples), torch.zeros(())).to(device)
        return self.accelerator.gather(weight).sum() if self.args.world_size > 1 else weight

    def _ignore_repeated_rows(self, batch: dict[str, torch.Tensor], num_rows: int, batch_size: int) -> None:
        """
        Removes the loss of rows that the last batch of an epoch, or of an evaluation, repeats. accelerate fills it
        with rows from the start, so that all processes have the same number of rows.
        """
        args = self.args
        is_last = self.accelerator.gradient_state.end_of_dataloader and not args.dataloader_drop_last
        # accelerate's own remainder is wrong if the run was resumed in the middle of this epoch.
        remainder = num_rows % (batch_size * args.world_size)
        if args.world_size == 1 or not is_last or not remainder:
            return
        positions = args.process_index * batch_size + torch.arange(len(batch["row_ids"]))
        repeated = (positions >= remainder).to(batch["labels"].device)
        batch["labels"][repeated], batch["turn_kinds"][repeated] = IGNORE_INDEX, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = self._loss_weights(inputs)
        kinds, row_ids = inputs.pop("turn_kinds"), inputs.pop("row_ids")
        num_tokens, branches = inputs.pop("num_tokens", None), inputs.pop("branches", None)
        if branches is not None:
            config, dtype = self.model.config.get_text_config(), self._score_dtype
            inputs["attention_mask"] = attention_mask(branches, inputs["position_ids"], config, dtype)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        labels = inputs.pop("labels")[:, 1:]
        labelled = labels != IGNORE_INDEX
        # TRL's fused LM head works in tiles and never holds all logits. With Triton (CUDA, XPU) it selects the
        # labelled positions itself; elsewhere (CPU, MPS) it scores every position that it gets
        # (trl/trainer/utils.py, add_fused_lm_head). So it gets only the labelled positions.
        outputs = model(
            **inputs, positions_to_keep=F.pad(labelled, (0, 1)), shift_labels=labels[labelled], fused_lm_head=True
        )
        # 0 at positions without a label. Even without any label, the losses stay connected to the model, because the
        # other processes wait for its backward pass.
        token_losses = outputs.log_probs.new_zeros(labels.shape).masked_scatter(labelled, -outputs.log_probs)
        # In evaluation there is no num_items_in_batch: the mean is over this batch.
        total_weight = weights.sum() if num_items_in_batch is None else num_items_in_batch
        weighted_losses = weights * token_losses
        if self.args.loss_type == "dft":
            # Dynamic fine-tuning, as in TRL: weight by the token's probability (https://arxiv.org/abs/2508.05629).
            weighted_losses = weighted_losses * (-token_losses.detach()).exp()
        weighted_loss = weighted_losses.sum()
        loss = weighted_loss / total_weight.clamp_min(torch.finfo(weights.dtype).tiny)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over the processes
        if self.aux_loss_enabled:
            # As in TRL: the mean over the positions of this batch, averaged over the batches of a step.
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._count(token_losses.detach(), outputs.is_top1, kinds)
        if self.aux_loss_enabled:
            self._count_aux_loss(outputs.aux_loss.detach())
        if self.model.training:
            self._count_packed(num_tokens)
            self.watch.micro_batches.append((row_ids, torch.stack([weighted_loss.detach(), weights.sum()]).float()))
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                self.watch.check(self.state.global_step + 1)  # its backward pass applies the step
        return (loss, outputs) if return_outputs else loss

    def _count(self, token_losses: torch.Tensor, is_top1: torch.Tensor, kinds: torch.Tensor) -> None:
        shifted = kinds[:, 1:]
        begins = (shifted != kinds[:, :-1]) & (shifted != 0)
        sums = [is_top1.sum()]
        for kind in (ANSWER, QUESTION):
            mask = shifted == kind
            sums += [(token_losses * mask).sum(), mask.sum(), (begins & mask).sum()]
        mode = "train" if self.model.training else "eval"
        # The sums stay on the device: reading them would make every batch wait for it.
        self._sums[mode] = self._sums.get(mode, 0) + torch.stack([s.float() for s in sums])

    def _count_aux_loss(self, aux_loss: torch.Tensor) -> None:
        self._aux_losses.setdefault("train" if self.model.training else "eval", []).append(aux_loss)

    @property
    def _score_dtype(self) -> torch.dtype:
        """The precision of attention scores, where eager attention adds the mask."""
        device_type = self.accelerator.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return without_adapter(self.model).model.language_model.dtype

    def _count_packed(self, tokens: torch.Tensor | None) -> None:
        if tokens is not None:
            room = torch.full_like(tokens, self.packs.packs_per_batch * self.packs.max_length)
            self._packed = self._packed.to(tokens.device) + torch.stack([tokens, room])

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # sharded under FSDP2
        return norm

    @property
    def run(self) -> dict[str, int | str]:
        """Values that the losses depend on, besides the model's settings. Saved with each checkpoint."""
        args = self.args
        return {
            "num_processes": args.world_size,
            "rows_per_step": self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "num_rows": len(self.train_dataset),
            "seed": args.seed,
            # With packing, rows_per_step counts packs.
            "packing": self.packs is not None,
            "max_rows_per_image": self.max_rows_per_image,
            "sharding": sharding_of(self.accelerator),
        }

    def train(self, *args, **kwargs):
        """Like the Trainer's. With a single process, an error first saves the steps since the last checkpoint."""
        try:
            return super().train(*args, **kwargs)
        except CheckpointError:
            raise  # saving again would fail again
        except Exception as error:
            self._rescue(error)
            raise
        finally:
            self.watch.restore_handlers()

    def _rescue(self, error: Exception) -> None:
        saved, step = self.watch.saved_step, self.state.global_step
        if saved is None or self.args.save_strategy == "no":
            return
        # Saving needs all processes, and others may be elsewhere. While a step is applied, only some weights are new.
        if self.args.world_size == 1 and step > saved and not self.watch.applying:
            self.args.save_total_limit = None  # keep older checkpoints, from before the cause of the error
            self._save_checkpoint(self.model, trial=None)
            saved = step
        error.add_note(
            f"{step} steps were trained. --resume resumes from {f'checkpoint-{saved}' if saved else 'the beginning'}."
        )

    def _prepare_for_training(self, *args, **kwargs):
        with embeddings_in_the_root_unit(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # When a finished run is resumed, the Trainer would train one more step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        step, limit = self.state.global_step, self.args.save_total_limit
        before, self.watch.saved_step = self.watch.saved_step, step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        try:
            if self.args.should_save:
                # Without this file, the folder does not count as complete while it is overwritten.
                (folder / STATE_FILE).unlink(missing_ok=True)
            # Older checkpoints are removed below, when a power failure cannot damage the new one any more.
            self.args.save_total_limit = None
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                sync(folder)
                best = self.state.best_model_checkpoint
                rotate_checkpoints(
                    self.args.output_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            if not checkpoint_faults(folder):
                raise  # the checkpoint is complete; something after it failed, such as an upload
            free = decimal(shutil.disk_usage(self.args.output_dir).free)
            shutil.rmtree(folder, ignore_errors=True)
            rest = f"checkpoint-{before} is unchanged" if before else "there is no earlier checkpoint"
            raise CheckpointError(
                f"{folder} could not be written ({free} free on the disk): {error}. It was removed; {rest}. Free disk "
                "space, then resume with --resume."
            ) from error
        finally:
            self.args.save_total_limit = limit

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Full finetuning trains and resumes in float32. The final model has the precision of its config.json, which is
        # that of the frozen tower.
        is_final = output_dir is not None and Path(output_dir).name == HALF_WRITTEN_MODEL
        if state_dict is not None and not isinstance(self.model, PeftModel):
            # In the copies that FSDP2 and DeepSpeed give, a tied head is a weight of its own.
            state_dict = {name: w for name, w in state_dict.items() if name not in self.model.all_tied_weights_keys}
        if is_final and not isinstance(self.model, PeftModel):
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = in_precision(state_dict, self.model.dtype)
        with own_class(self.model):
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a checkpoint (`_internal_call`), or the final model, which is complete or not there at any moment."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        final = Path(output_dir or self.args.output_dir)
        part = final / HALF_WRITTEN_MODEL
        if self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
        try:
            with full_disk_named(final):
                super().save_model(str(part))
                if sharding_of(self.accelerator) == "fsdp2-sharded":
                    # The Trainer saves only shards, which the next stage, `merge` and AutoModel cannot load.
                    self._save(str(part), self.accelerator.get_state_dict(self.model))
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    place_model(part, final)
        finally:
            if self.args.should_save:
                shutil.rmtree(part, ignore_errors=True)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with written_whole(Path(self.args.output_dir) / STATE_FILE) as new:
                self.state.save_to_json(new)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last two files mark a checkpoint as complete, so they are written after the files of all processes.
        sync(Path(output_dir))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            found = {"first_losses": self.watch.first_losses, "files": file_sizes(Path(output_dir))}
            write_json(Path(output_dir) / RUN_FILE, self.run | found)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        run = {} if checkpoint is None else json.loads((Path(checkpoint) / RUN_FILE).read_text())
        self.watch.first_losses = run.get("first_losses", [])

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes no card into an adapter folder; `merge_adapter` writes the card of the merged checkpoint."""

    def collect_metrics(self, mode: Literal["train", "eval"]) -> dict[str, float]:
        """Returns the metrics over all batches of all processes since the last call; none if there was no batch."""
        if mode not in self._sums:
            return {}
        sums = self._sums.pop(mode).to(self.accelerator.device, torch.float32)
        top1, *by_kind = self.accelerator.reduce(sums, reduction="sum").tolist()
        answer_loss, answer_tokens, answers, question_loss, question_tokens, questions = by_kind
        metrics = {
            "loss_answers": answer_loss / max(answer_tokens, 1),
            "mean_token_accuracy": top1 / max(answer_tokens + question_tokens, 1),
            "self_question_share": questions / max(answers + questions, 1),
        }
        if question_tokens:
            metrics["loss_questions"] = question_loss / question_tokens
        if mode in self._aux_losses:
            aux_loss = torch.stack(self._aux_losses.pop(mode)).mean()
            metrics["aux_loss"] = self.accelerator.reduce(aux_loss, reduction="mean").item()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs.update(self.collect_metrics("train"))
        if self.packs is not None and "loss" in logs:
            packed = self._packed.to(self.accelerator.device, torch.float32)
            tokens, room = self.accelerator.reduce(packed, reduction="sum").tolist()
            logs["packing_fill"] = tokens / max(room, 1)
            self._packed = torch.zeros(2)
        if "learning_rate" in logs and self.optimizer is not None:
            logs.update({f"learning_rate_{g['part']}": g["lr"] for g in self.optimizer.param_groups})
        super().log(logs, start_time)

"""The model class for lmms-eval. It answers in batches with an [`Assistant`]; `lmms_eval_plugin.py` has the command.

Prompts, metrics and data are those of lmms-eval. Where `sq-llava evaluate` computes a metric differently, it also
reports lmms-eval's version as `lmms_eval/...`. Only text and images are supported, and only tasks that generate text.
"""

import json
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from rich.progress import track

from sq_llava.evaluation.other_models import load_any


MAX_NEW_TOKENS = 1024
# Settings of a task that are passed to `generate`. `until` is ignored, as in lmms-eval's own models: its default is a
# blank line, which would cut long answers.
SETTINGS = ("temperature", "top_p", "top_k", "num_beams")
NO_SETTINGS = ("until", "max_new_tokens", "do_sample", "image_aspect_ratio")


class SQLlava(lmms):
    """
    SQ-LLaVA as a chat model of lmms-eval.

    Args:
        pretrained (`str`): A checkpoint folder, an adapter folder, or a Hub id.
        batch_size (`int`): Batch size per process, in prompts.
        device (`str`, *optional*): Default: the device of the process.
        dtype (`str`): As for `sq_llava.inference.assistant.load`.
        system_message (`str`, *optional*): Replaces the model's own system message.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # not used, but lmms-eval passes it to every model
        device: str | None = None,
        dtype: str = "auto",
        system_message: str | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 or device is None:
            device = str(self.accelerator.device)
        self.device = device
        self.batch_size = int(batch_size)
        self.system_message = system_message
        self.assistant = load_any(pretrained, dtype, device)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests."""
        asked = [self._conversation(request) for request in requests]
        groups: dict[Any, list[int]] = {}
        for number, (request, (images, _)) in enumerate(zip(requests, asked)):
            # A batch has the same settings and the same number of images throughout.
            groups.setdefault((json.dumps(request.args[2], sort_keys=True), len(images)), []).append(number)
        batches = [
            numbers[start : start + self.batch_size]
            for numbers in groups.values()
            for start in range(0, len(numbers), self.batch_size)
        ]
        answers: dict[int, str] = {}
        for batch in track(batches, description="Answering", disable=self._rank != 0):
            settings = generation_settings(requests[batch[0]].args[2])
            texts = self.assistant.answer_batch([(asked[n][0] or None, asked[n][1]) for n in batch], **settings)
            for number, text in zip(batch, texts):
                answers[number] = text
                context, _, settings_of_task, *_ = requests[number].args
                self.cache_hook.add_partial("generate_until", (context, settings_of_task), text)
        return [answers[number] for number in range(len(requests))]

    def _conversation(self, request: Instance) -> tuple[list[Any], list[dict[str, Any]]]:
        """The images of a request, and its messages with placeholders for them."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError(f"{task}, document {doc_id}: has video or audio. SQ-LLaVA supports only images and text.")
        conversation = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if part.type == "image" else {"type": "text", "text": part.text}
                    for part in message.content
                ],
            }
            for message in messages.messages
        ]
        if self.system_message is not None:
            system = {"role": "system", "content": [{"type": "text", "text": self.system_message}]}
            conversation = [system, *(message for message in conversation if message["role"] != "system")]
        return images, conversation

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("SQ-LLaVA supports only tasks with output_type generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("SQ-LLaVA supports only tasks of a single round, with output_type generate_until.")


def generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """
    Converts a task's settings for `generate`. A temperature of 0, which many tasks set, means greedy decoding.

        >>> generation_settings({"temperature": 0, "top_p": 1.0, "max_new_tokens": 16, "until": ["."]})
        {'max_new_tokens': 16, 'do_sample': False}

    Raises:
        ValueError: For an unknown setting.
    """
    unknown = settings.keys() - {*SETTINGS, *NO_SETTINGS}
    if unknown:
        raise ValueError(f"generation_kwargs: {', '.join(sorted(unknown))} is not supported by SQ-LLaVA.")
    do_sample = bool(settings.get("do_sample")) and bool(settings.get("temperature", 1.0))
    names = SETTINGS if do_sample else ("num_beams",)
    chosen = {name: settings[name] for name in names if settings.get(name) is not None}
    return {"max_new_tokens": settings.get("max_new_tokens") or MAX_NEW_TOKENS, "do_sample": do_sample, **chosen}

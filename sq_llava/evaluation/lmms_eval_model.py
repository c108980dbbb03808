"""The model that lmms-eval asks: an [`Assistant`] in batches. `lmms_eval_plugin.py` has the command.

Prompts, metrics and data are lmms-eval's own, and so are its figures; where they differ from those of `sq-llava
evaluate`, that names its own `lmms_eval/...`. Text and images only; what needs likelihoods is refused.
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
# What generation takes of a task's settings. `until` is none of them: where a task gives none, lmms-eval sets a blank
# line, which would cut long answers, and its own models ignore it too.
SETTINGS = ("temperature", "top_p", "top_k", "num_beams")
NO_SETTINGS = ("until", "max_new_tokens", "do_sample", "image_aspect_ratio")


class SQLlava(lmms):
    """
    Args:
        pretrained (`str`): A plain checkpoint, an adapter folder, or a Hub id.
        batch_size (`int`): Prompts at a time, on each process.
        device (`str`, *optional*): Default: that of the process.
        dtype (`str`): As of `sq_llava.inference.assistant.load`.
        system_message (`str`, *optional*): In place of the model's own.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # lmms-eval gives it to every model
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
            # Text alone goes apart from images.
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
        """The images of a request, and its messages with places for them."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError(f"{task}, {doc_id}: has video or audio: SQ-LLaVA sees images only.")
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
        raise NotImplementedError("SQ-LLaVA is asked for answers only: choose a task of generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("SQ-LLaVA is asked in one round only: choose a task of generate_until.")


def generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """
    What `generate` takes of a task's settings: a temperature of 0, which many tasks give, is greedy decoding.

        >>> generation_settings({"temperature": 0, "top_p": 1.0, "max_new_tokens": 16, "until": ["."]})
        {'max_new_tokens': 16, 'do_sample': False}

    Raises:
        ValueError: for a setting that is not known here.
    """
    unknown = settings.keys() - {*SETTINGS, *NO_SETTINGS}
    if unknown:
        raise ValueError(f"generation_kwargs: {', '.join(sorted(unknown))} cannot be given to SQ-LLaVA.")
    do_sample = bool(settings.get("do_sample")) and bool(settings.get("temperature", 1.0))
    names = SETTINGS if do_sample else ("num_beams",)
    chosen = {name: settings[name] for name in names if settings.get(name) is not None}
    return {"max_new_tokens": settings.get("max_new_tokens") or MAX_NEW_TOKENS, "do_sample": do_sample, **chosen}

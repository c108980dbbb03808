"""Any image-text-to-text model of transformers behind the interface of SQ-LLaVA, so that the same code scores both.

>>> load_any("llava-hf/llava-1.5-7b-hf").answer("photo.jpg", "What is it?")
"""

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from sq_llava.data.messages import place_images_of_all
from sq_llava.inference.assistant import Assistant, best_device, load
from sq_llava.inference.prompts import decode, room_in_context
from sq_llava.locations import is_adapter


def load_any(path: str, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False) -> Assistant:
    """
    Loads an SQ-LLaVA as [`sq_llava.load`] does, or any other image-text-to-text model of transformers.

    Args:
        path (`str`): A checkpoint folder, an adapter folder of SQ-LLaVA, or a Hub id.
        dtype (`str`): As for [`sq_llava.load`].
        device (`str`, *optional*): Default: the best device available.
        trust_remote_code (`bool`): Allow a model whose code is not in transformers to run its own.

    Returns:
        [`Assistant`].

    Raises:
        ValueError: If the checkpoint lacks weights. transformers would initialize them randomly.
    """
    if is_adapter(path):
        return load(path, device=device, dtype=dtype)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if config.model_type == "sq_llava":
        return load(path, device=device, dtype=dtype)
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    if report["missing_keys"]:  # transformers only warns about these
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{path}: the checkpoint lacks {len(missing)} weights, such as {', '.join(missing[:3])}.")
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    processor.tokenizer.padding_side = "left"
    return OtherModel(model.to(device or best_device()).eval(), processor)


class OtherModel(Assistant):
    """A model that is not an SQ-LLaVA. Its own processor prepares all inputs of a batch in one call."""

    @torch.inference_mode()
    def answer_batch(self, requests: list[tuple], max_new_tokens: int = 512, **generate_kwargs) -> list[str]:
        """Like [`Assistant.answer_batch`], but common prefixes of prompts are computed for each prompt."""
        try:
            inputs = self.processor.apply_chat_template(
                place_images_of_all(requests),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "add_special_tokens": False},
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error
        room = room_in_context(self.model, [int(inputs["attention_mask"].sum(dim=1).max())], max_new_tokens)
        if len(requests) > 1 and room < max_new_tokens:
            # The context window cuts the answer to the longest prompt. One by one, the others keep their full length.
            return [self.answer(*request, max_new_tokens, **generate_kwargs) for request in requests]
        settings = {"do_sample": False, **generate_kwargs, "max_new_tokens": room}
        output = self.model.generate(**inputs.to(self.model.device), **settings)
        return decode(self.processor, output[:, inputs["input_ids"].shape[1] :])

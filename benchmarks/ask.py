"""Sampling n questions about an image in one call, compared with n separate `generate` calls as in the release.

    python -m benchmarks.ask            # under two minutes on two cores; writes benchmarks/results/ask.{json,md}

Both sides use the same random model (CLIP-B with 4 layers, 256 image tokens, prototypes; a language model with the
width and vocabulary of SmolLM2-135M and 8 layers), the same pictures, the same conversation of one answered turn, and
the release's sampling settings. All questions have the same length. Preprocessing is included on both sides. Not
measured: real weights, and the description that the model first writes for an image without a conversation.
"""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import common
from benchmarks.generate import DEVICE, sizes_of, without_end
from benchmarks.random_models import square_image_processor
from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.inference.assistant import Assistant, place_images


HISTORY = [
    {"role": "user", "content": "What is in the picture, and what is it doing there?"},
    {"role": "assistant", "content": "A dog is running through the green grass of a park, behind a red ball."},
]
SAMPLING = {"temperature": 1.2, "top_k": 300, "top_p": 0.95}
SHAPES = ((1, 1), (1, 4), (1, 16), (4, 2))  # number of images, questions about each


def make_assistant(vision_layers: int, text_layers: int) -> Assistant:
    """A random model whose tokenizer has one token for each byte."""
    torch.manual_seed(0)
    letters = {letter: number for number, letter in enumerate(["</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    # One token for each byte makes texts long. A short system message keeps the prompt at a usual length.
    processor = SQLlavaProcessor(
        square_image_processor(224), tokenizer, image_seq_length=256, system_message="A chat."
    )
    markers = {"image_token_id": processor.image_token_id, "vusr_token_id": processor.vusr_token_id}
    model = SQLlavaForConditionalGeneration(SQLlavaConfig(**sizes_of(vision_layers, text_layers), **markers))
    return Assistant(without_end(model.to(DEVICE), tokenizer.pad_token_id), processor)


@torch.inference_mode()
def ask_separately(assistant: Assistant, images: list[Image.Image], num_questions: int, new_tokens: int) -> int:
    """Makes one call for each question. Returns the length of a prompt in tokens."""
    for image in images:
        for _ in range(num_questions):
            inputs = assistant.processor.apply_chat_template(
                place_images(image, HISTORY),
                add_generation_prompt=True,
                ask=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(assistant.model.device)
            assistant.model.generate(**inputs, **SAMPLING, do_sample=True, max_new_tokens=new_tokens)
    return inputs["input_ids"].shape[1]


def to_markdown(report: dict) -> str:
    rows = []
    for row in report["rows"]:
        seconds = [common.with_spread(common.summary(row[name])) for name in ("separate", "together")]
        rows.append([row["images"], row["questions"], *seconds, f"**{common.with_spread(row['times_faster'])}**"])
    return common.text(
        "# Many questions about an image in one call, compared with separate calls",
        f"A prompt has {report['prompt_tokens']} tokens, 256 of them for the image. A question has "
        f"{report['new_tokens']} tokens. The goal is 4 times faster for 16 questions. Median (lowest to highest) of "
        f"{report['rounds']} rounds.",
        common.table(
            ["images", "questions about each", "separate calls, s", "one call, s", "times faster"], rows, left=0
        ),
    )


def main() -> None:
    arguments = common.parse_arguments(__doc__)
    new_tokens, rounds = (4, 1) if arguments.quick else (16, 2)
    assistant = make_assistant(1, 1) if arguments.quick else make_assistant(vision_layers=4, text_layers=8)
    images = [Image.effect_noise((640, 480), 60 + 10 * number).convert("RGB") for number in range(4)]
    rows = []
    for num_images, num_questions in SHAPES:
        shown, histories = images[:num_images], [HISTORY] * num_images

        def separate(shown=shown, num_questions=num_questions):
            return ask_separately(assistant, shown, num_questions, new_tokens)

        def together(shown=shown, histories=histories, num_questions=num_questions):
            assistant.ask_batch(shown, histories, num_questions, **SAMPLING, max_new_tokens=new_tokens)

        times = common.interleave({"separate": separate, "together": together}, rounds, warm_up=not rows)
        times_faster = common.ratio(times, "separate", "together")
        rows.append({"images": num_images, "questions": num_questions, **times, "times_faster": times_faster})
    prompt_tokens = ask_separately(assistant, images[:1], 1, 1)
    report = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds, "rows": rows}
    common.save("ask", report, to_markdown, arguments)


if __name__ == "__main__":
    main()

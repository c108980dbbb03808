"""Sampling n questions about an image beside n generate calls, as the release asks; also about four images together.

    python -m benchmarks.ask            # under two minutes on two cores; writes benchmarks/results/ask.{json,md}
    python -m benchmarks.ask --quick    # small, writes nothing

Both sides have the same random model (CLIP-B of 4 layers, 256 image tokens, prototypes; a language model with the
width and vocabulary of SmolLM2-135M and 8 layers), the same pictures and conversation (one answered turn) and the
release's sampling. All questions are equally long, and preprocessing is measured on both sides. What is not measured:
real weights, the description that an image without a conversation gets first.
"""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from benchmarks import common
from benchmarks.generate import configs
from configuration_sq_llava import SQLlavaConfig
from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.inference.assistant import Assistant, place_images


HISTORY = [
    {"role": "user", "content": "What is in the picture, and what is it doing there?"},
    {"role": "assistant", "content": "A dog is running through the green grass of a park, behind a red ball."},
]
SAMPLING = {"temperature": 1.2, "top_k": 300, "top_p": 0.95}
SHAPES = ((1, 1), (1, 4), (1, 16), (4, 2))  # images, questions about each


def make_assistant(vision_layers: int, text_layers: int) -> Assistant:
    """A random model with a tokenizer of bytes."""
    torch.manual_seed(0)
    letters = {letter: number for number, letter in enumerate(["</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    # Bytes are many: a short system message leaves a prompt of the usual length.
    processor = SQLlavaProcessor(
        CLIPImageProcessorPil(**size), tokenizer, image_seq_length=256, system_message="A chat."
    )
    markers = {"image_token_id": processor.image_token_id, "vusr_token_id": processor.vusr_token_id}
    model = SQLlavaForConditionalGeneration(SQLlavaConfig(**configs(vision_layers, text_layers), **markers))
    model.generation_config.eos_token_id = None  # each question has all its tokens
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Assistant(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor)


@torch.inference_mode()
def ask_separately(assistant: Assistant, images: list[Image.Image], num_questions: int, new_tokens: int) -> int:
    """One call for each question. Returns the length of a prompt."""
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
    lines = [
        "# Questions about an image beside separate calls",
        "",
        f"Prompts of {report['prompt_tokens']} tokens, 256 of them the image's; {report['new_tokens']} tokens a "
        f"question. Goal: 4 times faster for 16 questions. Median (lowest to highest) of {report['rounds']} rounds.",
        "",
        "| images | questions about each | separate calls, s | together, s | times faster |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        seconds = [common.with_spread(common.summary(row[name])) for name in ("separate", "together")]
        times = common.with_spread(row["times_faster"])
        lines.append(f"| {row['images']} | {row['questions']} | {seconds[0]} | {seconds[1]} | **{times}** |")
    return "\n".join(lines)


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
    common.save("ask", report, to_markdown(report), arguments)


if __name__ == "__main__":
    main()

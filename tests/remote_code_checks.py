"""Uses a checkpoint folder without this project: `test_remote_code.py` runs this file in a process of its own.

    python -P tests/remote_code_checks.py FOLDER

FOLDER holds checkpoints (`float32`, `bfloat16`, `sharded`) and `expected.pt`. The outcome of each check of `CHECKS` is
written to `results.json`.
"""

import json
import runpy
import shutil
import sys
from pathlib import Path


CODE_FILES = [
    "configuration_sq_llava.py",
    "modeling_sq_llava.py",
    "image_processing_sq_llava.py",
    "processing_sq_llava.py",
]
OUT_OF_REACH = runpy.run_path(str(Path(__file__).with_name("out_of_reach.py")))


def the_sources_cannot_be_imported(folder, expected):
    for name in OUT_OF_REACH["SOURCES"]:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} can be imported")


def without_trust_nothing_loads_and_no_code_runs(folder, expected):
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    trapped, trace = folder / "trapped", folder / "code_ran"
    shutil.copytree(folder / "float32", trapped)
    for name in CODE_FILES:
        with (trapped / name).open("a") as file:
            file.write(f"\nopen({str(trace)!r}, 'w').close()\n")
    loaders = [auto.from_pretrained for auto in (AutoConfig, AutoProcessor, AutoModel, AutoModelForImageTextToText)]
    for load in (*loaders, lambda model, **kwargs: pipeline("image-text-to-text", model=str(model), **kwargs)):
        for kwargs in ({}, {"trust_remote_code": False}):
            try:
                load(trapped, **kwargs)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise AssertionError(f"{load} loaded without trust_remote_code")
    assert not trace.exists()
    AutoConfig.from_pretrained(trapped, trust_remote_code=True)
    assert trace.exists()  # the trap works


def config_comes_from_the_folders_code(folder, expected):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / "float32", trust_remote_code=True)
    assert type(config).__name__ == "SQLlavaConfig"
    assert type(config).__module__.startswith("transformers_modules.")
    assert config.image_seq_length == 9


def tokenizer_gives_the_same_ids(folder, expected):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "float32", trust_remote_code=True)
    assert tokenizer("a dog<image>\n[vusr] b").input_ids == expected["token_ids"]
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == expected["chat_template"]


def image_processor_gives_the_same_pixels(folder, expected):
    import torch
    from transformers import AutoImageProcessor

    image_processor = AutoImageProcessor.from_pretrained(folder / "float32", trust_remote_code=True)
    pixel_values = image_processor(expected["images"], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values, expected["inputs"]["pixel_values"])


def pictures_of_all_modes_are_read_as_documented(folder, expected):
    import base64
    import io

    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "float32", trust_remote_code=True)
    for picture in expected["pictures"]:
        file, image = picture["file"], picture["image"]
        ways = [image]
        if file is not None:
            (folder / "picture").write_bytes(file)
            url = "data:image/png;base64," + base64.b64encode(file).decode()
            ways = [Image.open(io.BytesIO(file)), str(folder / "picture"), folder / "picture", file, url]
        for way in ways:
            try:
                pixels = processor(images=way, text="<image>", return_tensors="pt")["pixel_values"]
            except ValueError:
                pixels = None
            same = pixels is None if picture["pixels"] is None else pixels.equal(picture["pixels"])
            assert same, (picture["row"], type(way))


def processor_is_ours_and_not_a_bare_tokenizer(folder, expected):
    import torch
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "float32", trust_remote_code=True)
    assert type(processor).__name__ == "SQLlavaProcessor"
    assert type(processor).__module__.startswith("transformers_modules.")
    inputs = prompt_of(processor, expected)
    assert inputs.keys() == expected["inputs"].keys()
    assert all(torch.equal(inputs[name], expected["inputs"][name]) for name in inputs)


def prompt_of(processor, expected):
    return processor.apply_chat_template(
        expected["messages"],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )


def automodel_generates(folder, expected):
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "float32", trust_remote_code=True)
    assert type(model).__name__ == "SQLlavaForConditionalGeneration"
    assert torch.equal(model.generate(**expected["inputs"], do_sample=False, max_new_tokens=8), expected["generated"])


def every_way_of_decoding_gives_the_greedy_tokens(folder, expected):
    import torch
    from transformers import AutoModel, AutoTokenizer, TextIteratorStreamer
    from transformers.utils.versions import require_version

    model = AutoModel.from_pretrained(folder / "float32", trust_remote_code=True)
    inputs, generated = expected["inputs"], expected["generated"]
    settings = {"do_sample": False, "max_new_tokens": 8}
    ways = {
        "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
        "prompt look-up": {"prompt_lookup_num_tokens": 2},
        "an assistant model": {"assistant_model": model},
    }
    for name, way in ways.items():
        sequences = model.generate(**inputs, **{**settings, **way})
        assert torch.equal(sequences, generated.expand_as(sequences)), name
    # A cache that is already filled. Its name depends on the version of transformers.
    first = model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    name = "cache" if "cache" in first else "past_key_values"
    mask = torch.ones_like(first.sequences)
    again = {"input_ids": first.sequences, "attention_mask": mask, "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(model.generate(**again, **{name: first[name]}), generated), name

    tokenizer = AutoTokenizer.from_pretrained(folder / "float32", trust_remote_code=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, **settings, streamer=streamer)
    assert "".join(streamer).strip() == expected["answer"].strip()

    try:
        require_version("transformers>=5.19")
    except ImportError:
        return  # older versions mix up several images of a prompt that is expanded
    samples = model.generate(**inputs, **{**settings, "do_sample": True, "top_k": 1}, num_return_sequences=2)
    assert torch.equal(samples, generated.expand_as(samples))
    beams = model.generate(**inputs, **settings, num_beams=3, num_return_sequences=3)
    assert len(beams.unique(dim=0)) == 3


def automodel_from_config_is_the_base_without_head(folder, expected):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder / "float32", trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "SQLlavaModel"
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]
    assert model(**expected["inputs"])[0].shape[-1] == config.text_config.hidden_size


def automodels_for_images_and_text_give_the_same_logits(folder, expected):
    import torch
    from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto_class.from_pretrained(folder / "float32", trust_remote_code=True)
        assert type(model).__name__ == "SQLlavaForConditionalGeneration"
        with torch.no_grad():
            assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])


def pipeline_answers(folder, expected):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(folder / "float32"), trust_remote_code=True)
    settings = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 8}, "return_full_text": False}
    [answer] = pipe(text=expected["messages"], **settings)
    assert answer["generated_text"] == expected["answer"], answer
    answers = pipe(text=[expected["messages"]] * 2, batch_size=2, **settings)
    assert [answer["generated_text"] for [answer] in answers] == [expected["answer"]] * 2, answers
    [answer] = pipe(text=expected["text_only"], **settings)
    assert answer["generated_text"] == expected["text_only_answer"], answer
    [answer] = pipe(images=expected["images"], text=expected["prompt"], **settings)
    assert answer["generated_text"] == expected["answer"], answer


def saving_again_keeps_weights_bit_for_bit_and_code(folder, expected):
    import torch
    from transformers import AutoModel, AutoModelForImageTextToText

    for name in ("float32", "bfloat16", "sharded"):
        first = folder / name
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        weights = AutoModel.from_pretrained(first, trust_remote_code=True, dtype=dtype).state_dict()
        assert {weight.dtype for weight in weights.values()} == {dtype}
        assert weights["model.prototype_extractor.prototypes"].sum() == expected["sums"][name]
        source = first
        for number, auto_class in enumerate((AutoModel, AutoModelForImageTextToText, AutoModel)):
            model = auto_class.from_pretrained(source, trust_remote_code=True, dtype="auto")
            source = folder / f"{name}_again_{number}"
            model.save_pretrained(source, max_shard_size="200KB" if name == "sharded" else "50GB")
            assert (len(list(source.glob("*.safetensors"))) > 1) == (name == "sharded")
            assert_same_code(source, first, CODE_FILES[:2])
            again = AutoModel.from_pretrained(source, trust_remote_code=True, dtype="auto").state_dict()
            assert again.keys() == weights.keys()
            assert all(torch.equal(again[key], weights[key]) and again[key].dtype == dtype for key in weights)
            assert again["lm_head.weight"].data_ptr() != again["model.language_model.embed_tokens.weight"].data_ptr()


def assert_same_code(folder, first, names):
    for name in names:
        assert (folder / name).read_bytes() == (first / name).read_bytes(), f"{folder / name} differs"
    for file in folder.glob("*config.json"):
        assert "--" not in json.dumps(json.loads(file.read_text()).get("auto_map", {})), f"{file} names a repository"


def saving_a_processor_again_keeps_tokens_template_and_code(folder, expected):
    import torch
    from transformers import AutoProcessor

    source = folder / "float32"
    for number in range(2):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        source = folder / f"processor_again_{number}"
        processor.save_pretrained(source)
        assert_same_code(source, folder / "float32", CODE_FILES[2:])
        again = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        assert type(again).__name__ == "SQLlavaProcessor"
        inputs = prompt_of(again, expected)
        assert all(torch.equal(inputs[name], expected["inputs"][name]) for name in expected["inputs"])
        assert again.chat_template == expected["chat_template"]


def a_hub_repository_works_like_a_folder(folder, expected):
    """The repository is already in the Hub's cache, as after a download."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers import AutoModel, AutoProcessor

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = Path(HF_HUB_CACHE) / "models--org--sq-llava"
    shutil.copytree(folder / "float32", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = AutoModel.from_pretrained("org/sq-llava", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("org/sq-llava", trust_remote_code=True)
    assert torch.equal(
        model.generate(**prompt_of(processor, expected), do_sample=False, max_new_tokens=8), expected["generated"]
    )
    target = folder / "from_the_hub"
    model.save_pretrained(target)
    processor.save_pretrained(target)
    assert_same_code(target, folder / "float32", CODE_FILES)
    shutil.rmtree(repository)
    again = AutoModel.from_pretrained(target, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(target, trust_remote_code=True)
    assert torch.equal(
        again.generate(**prompt_of(processor, expected), do_sample=False, max_new_tokens=8), expected["generated"]
    )


CHECKS = [
    the_sources_cannot_be_imported,
    without_trust_nothing_loads_and_no_code_runs,
    config_comes_from_the_folders_code,
    tokenizer_gives_the_same_ids,
    image_processor_gives_the_same_pixels,
    pictures_of_all_modes_are_read_as_documented,
    processor_is_ours_and_not_a_bare_tokenizer,
    automodel_generates,
    every_way_of_decoding_gives_the_greedy_tokens,
    automodel_from_config_is_the_base_without_head,
    automodels_for_images_and_text_give_the_same_logits,
    pipeline_answers,
    saving_again_keeps_weights_bit_for_bit_and_code,
    saving_a_processor_again_keeps_tokens_template_and_code,
    a_hub_repository_works_like_a_folder,
]


if __name__ == "__main__":
    OUT_OF_REACH["run_checks"](CHECKS, Path(sys.argv[1]))

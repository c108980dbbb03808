"""Writes the data of the example: pictures, captions, conversations, and prompts for `text_probe`.

`photographs.json` describes photographs of scikit-image and parts of them. Each entry has a file, a box (pixels: left,
top, right, bottom; null for the whole photograph), a caption, and questions with answers. All texts were written for
this example. Three photographs are `unseen`: they are not in the training data.
"""

import json
import random
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageEnhance

from sq_llava.output import write_json


DESCRIBE = "Describe the picture."
# A copy keeps at least this share of each side, so that captions and numbers stay true.
KEPT_SHARE = 0.92
COUNTRIES = "France Italy Spain Germany Japan China India Egypt Greece Russia Canada Brazil Mexico Norway Kenya"
OPPOSITES = "hot big fast early happy light strong open dry clean high old loud rich easy full near soft"
THINGS = (
    "volcano piano desert bridge library compass glacier whale beehive lighthouse telescope guitar rainbow forest "
    "calendar mirror thermometer lake motor poem museum clock choir dictionary battery river planet doctor plane tent"
)
GROUPS = "fruits animals planets colors tools sports vegetables rivers instruments languages metals trees"


def provide_photograph(name: str) -> Image.Image:
    """A photograph of scikit-image, which is not imported."""
    [folder] = find_spec("skimage").submodule_search_locations
    with Image.open(Path(folder) / "data" / name) as image:
        return image.convert("RGB")


def read_descriptions() -> list[dict]:
    return json.loads(Path(__file__).with_name("photographs.json").read_text())


def cut_out(entry: dict) -> Image.Image:
    photograph = provide_photograph(entry["file"])
    return photograph.crop(entry["box"]) if entry["box"] else photograph


def varied(image: Image.Image, flip: bool, generator: random.Random) -> Image.Image:
    """A copy of a picture: its edges are cut, it is brighter or darker, and half of the copies are mirrored."""
    width, height = (round(size * generator.uniform(KEPT_SHARE, 1)) for size in image.size)
    left, top = generator.randint(0, image.width - width), generator.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height))
    if flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(image).enhance(generator.uniform(0.8, 1.2))


def write_pictures(folder: Path, copies: int, seed: int) -> None:
    """
    Writes `stage1.json` and `stage2.json` in LLaVA's layout, `pictures.json`, and the pictures.

    Stage 1 has the captions of all pictures, stage 2 conversations about the whole photographs only. A larger stage 2
    would need more steps than a CPU does in half an hour.

    Args:
        folder: Folder to write to.
        copies: Number of varied copies of each described picture.
        seed: Random seed of the copies and of the order of the questions.
    """
    generator = random.Random(seed)
    captions, conversations, pictures = [], [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(read_descriptions()):
        image = cut_out(entry)
        path = folder / "images" / f"{number}.png"
        image.save(path)
        pictures.append({**entry, "image": str(path)})
        for copy in range(0 if entry.get("unseen") else copies):
            name = f"{number}-{copy}.png"
            varied(image, entry.get("flip", True), generator).resize((128, 128)).save(folder / "images" / name)
            exchanges = [[DESCRIBE, entry["caption"]], *entry["questions"]]
            generator.shuffle(exchanges)
            captions.append(llava_row(name, [["", entry["caption"]]]))
            if entry["box"] is None:
                conversations.append(llava_row(name, exchanges))
    for name, content in {"stage1": captions, "stage2": conversations, "pictures": pictures}.items():
        write_json(folder / f"{name}.json", content)


def llava_row(image: str, exchanges: list[list[str]]) -> dict:
    turns = [turn for question, answer in exchanges for turn in (("human", question), ("gpt", answer))]
    conversation = [{"from": role, "value": text} for role, text in turns]
    conversation[0]["value"] = f"<image>\n{conversation[0]['value']}"
    return {"id": Path(image).stem, "image": image, "conversations": conversation}


def text_prompts() -> list[str]:
    """The questions of `text_probe`, which have nothing to do with the photographs."""
    countries, opposites, things, groups = (words.split() for words in (COUNTRIES, OPPOSITES, THINGS, GROUPS))
    return [
        *(f"What is the capital of {country}? Answer in one sentence." for country in countries),
        *(f"What is the opposite of '{word}'? Answer in one word." for word in opposites),
        *(f"Write a short sentence with the word '{word}'." for word in opposites),
        *(f"What is {a} plus {b}? Answer with the number." for a in range(2, 8) for b in range(3, 8)),
        *(f"In one sentence, what is the use of a {thing}?" for thing in things),
        *(f"Write one sentence about a {thing}." for thing in things),
        *(f"Name three {group}, in one line." for group in groups),
    ]

"""Checks the configurations of a checkpoint against each other, before a model is built from them.

    >>> config = read_config(json.loads(file.read_text()))
    >>> with at_most_parameters(2 * num_tensors + 1_000):
    ...     model = SQLlavaForConditionalGeneration(config)

A configuration may lie, by accident or on purpose. With a million layers, or images of 200,000 pixels, a command would
work for hours or take all memory. `sq_llava/checkpoints/inspection.py` compares the shapes of the weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from configuration_sq_llava import SQLlavaConfig
from processing_sq_llava import SQLlavaProcessor


# Parameters of a model whose files are not there to count. The largest models of transformers have about 50,000.
MOST_PARAMETERS = 200_000
# Each beam and each returned text is a copy of the whole batch.
MOST_TEXTS = 100


def one_line(error: Exception) -> str:
    """The kind and the text of an error of another library."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removeprefix("ValueError: ").rstrip(".: ")


def named_errors(function: Callable) -> Callable:
    """
    Wraps a function that reads the configuration or the tokenizer of another model with transformers. Its first
    argument names the model.

    Raises:
        ValueError: with the name of the model, for any error of a library about damaged files and wrong values.
    """

    @wraps(function)
    def call(model, *args, **kwargs):
        try:
            return function(model, *args, **kwargs)
        except (ValueError, OSError):
            raise
        except Exception as error:  # transformers and tokenizers raise errors of many kinds
            raise ValueError(f"{getattr(model, 'path', model)} cannot be read ({one_line(error)}).") from error

    return call


def require_fitting(processor: SQLlavaProcessor, config: SQLlavaConfig) -> None:
    """
    Raises:
        ValueError: if the processor makes images of another size than the model takes.
    """
    settings = {"image_processor": processor.image_processor.to_dict(), "image_seq_length": processor.image_seq_length}
    for fault in processor_faults(settings, config):
        raise ValueError(f"{fault}. Use the image processor that belongs to the vision tower.")


def read_config(fields: dict, file: str = "config.json") -> SQLlavaConfig:
    """
    The configuration with these fields.

    Args:
        file (`str`): Where they come from, for the error.

    Raises:
        ValueError: if a field is unknown or its value is wrong.
    """
    try:
        return SQLlavaConfig.from_dict(fields)
    except Exception as error:  # for wrong values, configurations of transformers raise errors of many kinds
        raise ValueError(f"{file}: {one_line(error)}") from error


@contextmanager
def at_most_parameters(most: int) -> Iterator[None]:
    """
    While this context lasts, a module with more parameters cannot be built. Even without memory for its weights, it
    could take hours.

    Raises:
        ValueError: if more than `most` parameters are created.
    """
    number = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal number
        number += parameter is not None
        if number > most:
            raise ValueError(f"it describes a model of more than {most:,} weights, but the files hold far fewer")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def processor_faults(settings: Mapping, config: SQLlavaConfig) -> list[str]:
    """
    What in `processor_config.json` does not fit the model: the size of the images and the number of image tokens.

    Args:
        settings: Content of the file.
        config ([`SQLlavaConfig`]): The model's configuration.
    """
    faults = []
    number = settings.get("image_seq_length", config.image_seq_length)
    if number != config.image_seq_length:
        faults.append(
            f"processor_config.json: image_seq_length is {number!r}, but the model has {config.image_seq_length} "
            "tokens per image"
        )
    images, side = settings.get("image_processor"), config.vision_config.image_size
    for field in ("size", "crop_size"):
        sides = images.get(field) if isinstance(images, dict) else None
        for name, value in sides.items() if isinstance(sides, dict) else [("", sides)]:
            if value not in (None, side):
                place = ", ".join(filter(None, ("image_processor", field, name)))
                faults.append(f"processor_config.json: {place} is {value!r}, but the vision tower takes {side} pixels")
    return faults


def generation_faults(settings: Mapping) -> list[str]:
    """What in `generation_config.json` would multiply the work and the memory."""
    return [
        f"generation_config.json: {name} is {value!r}, but must be an int from 1 to {MOST_TEXTS}"
        for name in ("num_beams", "num_return_sequences", "num_beam_groups")
        if (value := settings.get(name)) is not None and not (type(value) is int and 1 <= value <= MOST_TEXTS)
    ]

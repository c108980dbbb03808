"""Shared by the tasks with lettered options: LLaVA's instruction, and the options as text."""

from collections.abc import Sequence


INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"


def lettered(options: Sequence[str]) -> str:
    """
    One option per line.

        >>> lettered(["red", "blue"])
        'A. red\\nB. blue'
    """
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))

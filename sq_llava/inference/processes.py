"""The processes that a launcher such as torchrun started, and the device of each.

>>> state, device = join_processes(None)
>>> state.num_processes, device
(1, 'cuda')
"""

import os

from accelerate import PartialState

from sq_llava.inference.assistant import best_device


def join_processes(device: str | None) -> tuple[PartialState, str]:
    """
    Args:
        device (`str`, *optional*): `"cuda"`, `"cpu"`, ...; default: the first that there is. Of several processes,
            each has one of its own.

    Raises:
        ValueError: if a launcher started processes that could not be joined: each would do all of the work.
    """
    device = device or best_device()
    state = PartialState(cpu=device == "cpu")
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(f"{state.num_processes} process of {os.environ['WORLD_SIZE']} were joined: use torchrun.")
    return state, str(state.device) if state.num_processes > 1 else device

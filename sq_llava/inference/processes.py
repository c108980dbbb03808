"""The processes that a launcher such as torchrun started, and the device of this one.

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
        device (`str`, *optional*): `"cuda"`, `"cpu"`, ... Default: the first one available. With several
            processes, each process gets its own device.

    Returns:
        The state of the processes, and the device of this one.

    Raises:
        ValueError: if fewer processes were joined than were started. Each would then do all of the work.
    """
    device = device or best_device()
    state = PartialState(cpu=device == "cpu")
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the number of joined processes is {state.num_processes}. "
            "Start the command with torchrun."
        )
    return state, str(state.device) if state.num_processes > 1 else device

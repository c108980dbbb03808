"""The `sq-llava` command, also as `python -m sq_llava` and `torchrun -m sq_llava`."""

import signal

from sq_llava.stopping import one_line_when_stopped, stop_at_once


def main() -> None:
    signal.signal(signal.SIGINT, stop_at_once)
    from sq_llava.cli.main import app
    from sq_llava.console import quiet_warnings

    quiet_warnings()
    with one_line_when_stopped():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        app()


if __name__ == "__main__":
    main()

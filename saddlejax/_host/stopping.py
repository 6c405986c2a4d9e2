"""How an interrupted sweep stops its threads: between two lanes, two calls of a program, or two starts of a search."""

import threading

_own = threading.local()


class Stopped(BaseException):
    """The sweep that this thread computes for has been interrupted."""


def obey(event: threading.Event) -> None:
    """Let the work of this thread stop after the event."""
    _own.event = event


def check_stopped() -> None:
    """Raise where the work of this thread should stop."""
    event = getattr(_own, "event", None)
    if event is not None and event.is_set():
        raise Stopped

"""The end that nobody wished for, told to the watchers before the error goes on its way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from simpletuner.config.secrets import hidden
from simpletuner.errors import Interrupted, SimpletunerError
from simpletuner.events import RunFailed, Tell

__all__ = ["telling_failures"]


@contextmanager
def telling_failures(tell: Tell, secrets: Iterable[str] = ()) -> Iterator[Tell]:
    """Whatever leaves this block as an error is told as `RunFailed`, without the `secrets` that it may hold."""
    try:
        yield tell
    except BaseException as error:
        what, why, mend = (hidden(text, secrets) for text in _words(error))
        tell(RunFailed(what, why, mend, is_stopped=isinstance(error, Interrupted | KeyboardInterrupt)))
        raise


def _words(error: BaseException) -> tuple[str, str, str]:
    """What, why, mend; of an error that is none of ours its kind and first line."""
    if isinstance(error, SimpletunerError):
        return error.problem.what, error.problem.why, error.problem.mend
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", "", ""
    first = next(iter(str(error).splitlines()), "")
    return (f"{type(error).__name__}: {first}" if first else type(error).__name__), "", ""

"""Events as messages of Discord: multipart with the pictures as files, within Discord's limits.

Limits by its documentation: a message holds 2000 characters and 10 files, a file 10 MiB without a paid server.
"""

from __future__ import annotations

import io
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from simpletuner.events import (
    Event,
    Measured,
    Notice,
    Painted,
    Previewed,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    Saved,
    Stepped,
)
from simpletuner.reporting.measured import measured_line
from simpletuner.reporting.posting import Post
from simpletuner.reporting.raw import picture_bytes

__all__ = ["Discord", "delivered_url"]

MOST_CHARACTERS = 2000
MOST_FILES = 10
MOST_FILE_BYTES = 9_000_000
MOST_BODY_BYTES = 24_000_000
"""Of all files of a message."""
MOST_MESSAGES = 3
"""That one text is spread over; what is longer is cut off."""
PROMPT_CHARACTERS = 120
"""As much of a prompt is shown."""


@dataclass(frozen=True)
class Attachment:
    """A picture beside a message."""

    name: str
    content: bytes = field(repr=False)


class Discord:
    """The format of `webhook_type` discord."""

    overtaken: tuple[type[Event], ...] = (
        Progress,
        Stepped,
    )  # it takes 30 messages a minute: figures must not crowd out pictures

    def __init__(self, prefix: str = "") -> None:
        """`prefix` stands before each text."""
        self._prefix = prefix

    def event(self, event: Event) -> Callable[[int], Iterable[Post]]:
        """One message, or several where it is long."""
        files = [Attachment(f"preview_{event.inference_step}.png", event.png)] if isinstance(event, Previewed) else []
        text = self._prefix + _text(event)
        return lambda _dropped: _posts(text, files)

    def gallery(self, pictures: list[Painted]) -> Callable[[int], Iterable[Post]]:
        """Pictures with their names and prompts; one whose file is gone is named all the same."""

        def posts(_dropped: int) -> Iterable[Post]:
            read = [(one.path.name, picture_bytes(one.path)) for one in pictures]
            files = [Attachment(name, content) for name, content in read if content is not None]
            return _posts(self._prefix + _gallery_text(pictures), files)

        return posts


def delivered_url(url: str) -> str:
    """The address by which Discord answers when the message is kept, and says why if it is not."""
    return f"{url}{'&' if '?' in url else '?'}wait=true"


def _text(event: Event) -> str:
    match event:
        case RunStarted():
            return f"**Training begins** at step {event.step:,} of {event.steps:,}."
        case RunFinished():
            return f"**Training ended** at step {event.step:,}."
        case RunFailed():
            head = "**Training was stopped.**" if event.is_stopped else "**Training failed.**"
            return "\n".join([head, *map(plain, filter(None, (event.what, event.why, event.mend)))])
        case Previewed():
            how_far = f"{event.inference_step} of {event.inference_steps}"
            return f"{_titled(event)} at step {event.step:,}, in the making: {how_far}"
        case Notice():
            return ("\N{WARNING SIGN} " if event.level == "warning" else "") + plain(event.text)
        case Progress():
            return f"{plain(event.task)}: {event.done:,} of {event.total:,} {plain(event.unit)}"
        case Stepped():
            figures = f"loss {event.loss:.4f}, norm {event.grad_norm:.3g}, lr {event.learning_rate:.2e}"
            return f"Step {event.step:,} of {event.steps:,}: {figures}, {event.samples_per_s:.3g} samples/s"
        case Measured():
            return plain(measured_line(event))
        case Saved():
            return f"Saved the {'result' if event.final else 'checkpoint'} of step {event.step:,}: {plain(event.path.name)}"
    raise AssertionError(f"{event} is no event that is told")


def _gallery_text(pictures: Sequence[Painted]) -> str:
    lines = [f"**Gallery at step {pictures[0].step:,}**"]
    for one in pictures:
        prompt = one.prompt if len(one.prompt) <= PROMPT_CHARACTERS else one.prompt[: PROMPT_CHARACTERS - 1] + "…"
        lines.append(f"{_titled(one)}: {plain(prompt)}")
    return "\n".join(lines)


def _titled(picture: Painted | Previewed) -> str:
    whose = {"trained": "", "ema": " (average)", "base": " (base model)"}[picture.weights]
    return plain(picture.nickname) + whose


def _posts(text: str, files: Sequence[Attachment]) -> Iterator[Post]:
    """A message within the limits: long text spread over several, files beside the last of them and after it."""
    *before, last = split(text)
    for part in before:
        yield _post(part, [])
    first, *more = list(_bundles([_small_enough(one) for one in files])) or [[]]
    yield _post(last, first)
    for bundle in more:
        yield _post("", bundle)


def plain(text: str) -> str:
    """Text whose characters Discord does not take for its markup."""
    return _MARKUP.sub(r"\\\g<0>", text)


_MARKUP = re.compile(r"[\\*_~`|>#\[\]<]")


def split(text: str) -> list[str]:
    """Parts that each fit a message, broken between lines where there are any."""
    parts: list[str] = []
    rest = text.strip() or "…"
    while _length(rest) > MOST_CHARACTERS and len(parts) < MOST_MESSAGES - 1:
        head = _cut(rest, MOST_CHARACTERS)
        line_end = head.rfind("\n")
        head = head[:line_end] if line_end > 0 else head
        parts.append(head)
        rest = rest[len(head) :].lstrip("\n")
    if _length(rest) > MOST_CHARACTERS:
        rest = _cut(rest, MOST_CHARACTERS - 1) + "…"
    return [*parts, rest]


def _length(text: str) -> int:
    """In UTF-16 units, as the strictest of Discord's parts count."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _cut(text: str, most: int) -> str:
    """The longest beginning of at most so many UTF-16 units."""
    head = text[:most]
    while _length(head) > most:
        head = head[: len(head) - max(1, (_length(head) - most) // 2)]
    return head


def _bundles(files: list[Attachment]) -> Iterator[list[Attachment]]:
    """As many as one message may have."""
    bundle: list[Attachment] = []
    for one in files:
        is_heavy = sum(len(each.content) for each in [*bundle, one]) > MOST_BODY_BYTES
        if bundle and (len(bundle) == MOST_FILES or is_heavy):
            yield bundle
            bundle = []
        bundle.append(one)
    if bundle:
        yield bundle


def _small_enough(file: Attachment) -> Attachment:
    """A picture that is too large as PNG, as JPEG: to be looked at; the whole one lies in the run's folder."""
    if len(file.content) <= MOST_FILE_BYTES:
        return file
    smaller = io.BytesIO()
    try:
        with Image.open(io.BytesIO(file.content)) as image:
            image.convert("RGB").save(smaller, format="JPEG", quality=90)
    except OSError:  # no picture after all: Discord will say so
        return file
    return Attachment(f"{file.name.removesuffix('.png')}.jpg", smaller.getvalue())


def _post(text: str, files: Sequence[Attachment]) -> Post:
    """Nobody is called by a message: names such as @everyone in a prompt stay text."""
    content = json.dumps({"content": text, "allowed_mentions": {"parse": []}})
    if not files:
        return Post(content.encode("ascii"), "application/json")
    boundary = secrets.token_hex(16)
    parts = [('name="payload_json"', "application/json", content.encode("ascii"))]
    for number, file in enumerate(files):
        kind = "image/jpeg" if file.name.endswith(".jpg") else "image/png"
        parts.append((f'name="files[{number}]"; filename="{_safe(file.name)}"', kind, file.content))
    body = io.BytesIO()
    for name, kind, value in parts:
        body.write(f"--{boundary}\r\nContent-Disposition: form-data; {name}\r\nContent-Type: {kind}\r\n\r\n".encode())
        body.write(value + b"\r\n")
    body.write(f"--{boundary}--\r\n".encode())
    return Post(body.getvalue(), f"multipart/form-data; boundary={boundary}")


def _safe(name: str) -> str:
    """A file's name as a header may hold it."""
    return re.sub(r'["\\\x00-\x1f\x7f]', "_", name).encode("utf-8", "replace").decode("utf-8")

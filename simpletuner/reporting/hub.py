"""Uploads to the Hugging Face Hub: in order, by a thread of their own, tried again for a while. Training never waits for them.

What fails in the end is told with the command that uploads it by hand.
"""

from __future__ import annotations

import queue
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.config.sections import Hub
from simpletuner.errors import UserError
from simpletuner.events import Event, Notice, Progress, ResultReady, Saved, Tell

__all__ = ["HubUploads", "Upload", "by_hand", "patience_s"]

PAUSES_S = (2.0, 10.0, 60.0, 180.0, 300.0)
"""Between two attempts at one upload."""
TOLD_FROM_S = 60.0
"""A pause so long is told; what is mended sooner is nobody's concern."""
REACH_S = 20.0
"""How long the start waits for the hub's answer before it goes on without."""
LEAST_PATIENCE_S = 600.0
SLOW_BYTES_PER_S = 1_000_000.0
"""At the end what is left is waited for: ten minutes, and as long as it takes at this speed."""
LARGE_BYTES = 1 << 20
"""Files above this are sent one by one before the commit that names them."""
LOOK_EVERY_S = 0.2
TASK = "uploading"


@dataclass
class Upload:
    """Files that become one commit."""

    what: str
    """In words: "checkpoint-100"."""
    files: Mapping[str, Path]
    """By their place in the repository."""
    bytes: int = 0
    sent_bytes: int = field(default=0, compare=False)


class HubUploads:
    """The sink that sends what is saved. Its thread ends with the process, and tells nothing itself: what is told is told by
    the thread that trains."""

    def __init__(self, options: Hub, *, pauses_s: Sequence[float] = PAUSES_S) -> None:
        assert options.hub_model_id, "config/derive.py names the repository"
        self._options = options
        self._pauses_s = pauses_s
        self._tell: Tell = _nobody
        self._name = options.hub_model_id
        self._made = threading.Event()
        self._refusal: Exception | None = None
        self._queue: queue.Queue[Upload] = queue.Queue()
        self._open: list[Upload] = []
        self._failed: list[Upload] = []
        self._has_trouble = False
        """Whether it was told that uploads fail; it is told again only after one that succeeds."""
        self._news: queue.SimpleQueue[Notice] = queue.SimpleQueue()

    @property
    def repository(self) -> str:
        """`owner/name`; only the name while the hub has not told the owner."""
        return self._name

    def sign_in(self) -> None:
        """Make the repository. Raises UserError where the hub refuses; where it does not answer, that is tried again later."""
        threading.Thread(target=self._work, name="hub uploads", daemon=True).start()
        is_answered = self._made.wait(REACH_S)
        error = self._refusal
        if error is not None and _is_final(error):
            raise UserError(
                f"The hub does not let push_to_hub make or use the repository `{self._name}`: {_brief(error)}.",
                why="the token is not valid, or may not write there.",
                mend="run `hf auth login` with a token that may write, correct hub_model_id, or turn push_to_hub off.",
            )
        if error is not None or not is_answered:
            why = _brief(error) if error else "it does not answer"
            self._news.put(Notice(f"The hub cannot be reached yet ({why}); uploads are tried when they are due.", "warning"))

    @contextmanager
    def telling(self, tell: Tell) -> Iterator[HubUploads]:
        """What comes of uploads is told to `tell` from now on. At the block's end they are waited for, unless it failed."""
        self._tell = tell
        try:
            yield self
            self._wait()
        finally:
            self._tell_news()
            for upload in [*self._failed, *self._open]:
                tell(Notice(f"Not uploaded: {upload.what}. By hand:\n{by_hand(upload, self._name)}", "warning"))

    def __call__(self, event: Event) -> None:
        """Queue what is saved, and tell what came of the rest."""
        self._tell_news()
        if isinstance(event, Saved) and not event.final and self._options.push_checkpoints_to_hub:
            files = sorted(path for path in event.path.rglob("*") if path.is_file())
            self._put(event.path.name, {f"{event.path.name}/{path.relative_to(event.path).as_posix()}": path for path in files})
        elif isinstance(event, ResultReady):
            self._put("the result", event.files)

    def __str__(self) -> str:
        return "The hub's uploads"

    def _put(self, what: str, files: Mapping[str, Path]) -> None:
        upload = Upload(what, files, sum(path.stat().st_size for path in files.values()))
        self._open.append(upload)
        self._queue.put(upload)

    def _wait(self) -> None:
        """Until all is sent or failed, within bounds that are told."""
        total = sum(upload.bytes for upload in self._open)
        if not self._open:
            return
        patience = patience_s(total)
        self._tell(Notice(f"Uploading to {self._name}: waiting for it, at most {patience / 60:.0f} minutes. Ctrl-C ends that."))
        until_s = time.monotonic() + patience
        waiting = list(self._open)
        while self._open and time.monotonic() < until_s:
            self._tell_news()
            self._tell(Progress(TASK, _mebi(sum(upload.sent_bytes for upload in waiting)), _mebi(total) + 1, "MiB"))
            time.sleep(LOOK_EVERY_S)
        if not self._open:
            self._tell(Progress(TASK, _mebi(total) + 1, _mebi(total) + 1, "MiB"))

    def _tell_news(self) -> None:
        while not self._news.empty():
            self._tell(self._news.get())

    # the thread

    def _work(self) -> None:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would be drawn across the console's own
        try:
            self._make()
        except Exception as error:  # noqa: BLE001  # as the bus round a sink: whatever it is, training goes on or says why not
            self._refusal = error
        self._made.set()
        while True:
            upload = self._queue.get()
            if not self._is_sent(upload):
                self._failed.append(upload)
            self._open.remove(upload)

    def _is_sent(self, upload: Upload) -> bool:
        for pause_s in (*self._pauses_s, None):
            try:
                self._send(upload)
            except Exception as error:  # noqa: BLE001  # as above
                if not all(path.exists() for path in upload.files.values()):
                    self._news.put(Notice(f"{upload.what} was removed before it was uploaded: the line is slow.", "warning"))
                    return True
                if pause_s is None or _is_final(error):
                    self._news.put(Notice(f"The upload of {upload.what} failed: {_brief(error)}.", "warning"))
                    return False
                if pause_s >= TOLD_FROM_S and not self._has_trouble:
                    self._has_trouble = True
                    again = "it is tried again for a while, and training goes on."
                    self._news.put(Notice(f"The upload of {upload.what} fails so far ({_brief(error)}); {again}", "warning"))
                time.sleep(pause_s)
            else:
                self._has_trouble = False
                self._news.put(Notice(f"Uploaded {upload.what} to {self._name}."))
                return True
        raise AssertionError("the last attempt returns")

    def _make(self) -> None:
        """Make the repository if need be, and learn its owner."""
        from huggingface_hub import HfApi

        wanted = self._options.model_card_private
        self._name = HfApi().create_repo(self._name, private=wanted, exist_ok=True).repo_id
        if wanted and not HfApi().repo_info(self._name).private:
            self._news.put(Notice(f"The repository {self._name} is there already, and public: so will uploads be.", "warning"))
        self._refusal = None

    def _send(self, upload: Upload) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        if self._refusal is not None:
            self._make()
        upload.sent_bytes = 0
        additions = []
        for place, path in upload.files.items():
            addition = CommitOperationAdd(path_in_repo=place, path_or_fileobj=str(path))
            if path.stat().st_size > LARGE_BYTES:
                HfApi().preupload_lfs_files(self._name, additions=[addition], free_memory=False)
                upload.sent_bytes += path.stat().st_size
            additions.append(addition)
        HfApi().create_commit(self._name, operations=additions, commit_message=f"Upload {upload.what}")


def patience_s(size_bytes: int) -> float:
    """How long the end waits for so much to be sent."""
    return LEAST_PATIENCE_S + size_bytes / SLOW_BYTES_PER_S


def by_hand(upload: Upload, repository: str) -> str:
    """Commands that send the same files to the same places."""
    includes: dict[str, dict[str, None]] = {}
    lines = []
    for place, path in upload.files.items():
        if not path.as_posix().endswith(f"/{place}"):  # another name there
            lines.append(shlex.join(["hf", "upload", repository, path.as_posix(), place]))
            continue
        top, slash, _ = place.partition("/")
        includes.setdefault(path.as_posix().removesuffix(f"/{place}"), {})[f"{top}/*" if slash else place] = None
    for root, patterns in includes.items():
        words = ["hf", "upload", repository, root, ".", *(word for pattern in patterns for word in ("--include", pattern))]
        lines.append(shlex.join(words))
    return "\n".join(lines)


def _is_final(error: Exception) -> bool:
    """Whether the hub understood and refuses, so that another attempt would be in vain."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return False
    return 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 409, 412, 425, 429)


def _brief(error: Exception) -> str:
    """One line of an error, without the full stop."""
    lines: list[Any] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _mebi(size_bytes: int) -> int:
    return size_bytes >> 20


def _nobody(event: Event) -> None:
    """Nothing is told before the run's console stands."""

"""A model repository in the diffusers layout, on the hub or in a local folder: the same code for both.

Small JSON files are read without the weights; weights are fetched by component, as safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from simpletuner.errors import UserError

__all__ = ["Component", "Repository", "fingerprint_file", "verify_file"]

HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
INDEX = "model_index.json"
SMALL_FILES = ("*.json", "*.model", "*.txt")
"""Configurations and tokenizers."""
SAMPLE_BYTES = 64
POINTER_BYTES = 1024
"""A file that git-lfs has not fetched is shorter."""

T = TypeVar("T")


@dataclass(frozen=True)
class Component:
    """One component's files on this machine. `variant` is what `from_pretrained` must be told to find its weights."""

    folder: Path
    variant: str | None

    @property
    def weights(self) -> list[Path]:
        """The safetensors files of this variant, sorted."""
        return sorted(path for path in self.folder.glob("*.safetensors") if variant_of(path.name) == self.variant)

    def verify(self) -> None:
        """Raises UserError unless the weights are whole by their headers, and a configuration says of what network."""
        if not (self.folder / "config.json").is_file():
            raise UserError(
                f"`{self.folder}` has no `config.json`.",
                why="weights alone do not say what network they belong to.",
                mend="finish the download or copy of this folder, or choose another model.",
            )
        for path in self.weights:
            verify_file(path)


class Repository:
    """The folder or hub repository `name`, named by `option`."""

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        option: str = "pretrained_model_name_or_path",
    ) -> None:
        self.name = name
        self.revision = revision
        self.variant = variant
        folder = Path(os.path.expanduser(name)).absolute()
        self._root = folder if folder.is_dir() else None
        if self._root is None and not HUB_NAME.fullmatch(name):
            raise UserError(
                f"The model folder `{name}` is missing.",
                why=f"looked for `{folder}`, and it has not the form `owner/name` of a hub repository.",
                mend=f'set "{option}" to a folder in the diffusers layout or a hub repository.',
            )

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine, not a hub repository."""
        return self._root is not None

    @property
    def arguments(self) -> str:
        """What `from_pretrained` must be told to load the same files, as Python."""
        asked = {"revision": self.revision, "variant": self.variant}
        name = os.path.normpath(self.name) if self.is_local else self.name
        return ", ".join([repr(name), *(f"{name}={value!r}" for name, value in asked.items() if value)])

    def json(self, path: str) -> dict[str, Any]:
        """A small JSON file, e.g. `transformer/config.json`. Raises UserError."""
        file = self.file(path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            mend = "finish the download or copy, or choose another model."
            raise UserError(f"`{path}` of `{self.name}` cannot be read: {error}", f"it lies at `{file}`.", mend) from error
        if not isinstance(content, dict):
            raise UserError(f"`{path}` of `{self.name}` is not a JSON object.", why=f"it lies at `{file}`.")
        return content

    def scheduler_config(self) -> dict[str, Any]:
        """What its gallery's scheduler is made of. Raises UserError."""
        return self.json("scheduler/scheduler_config.json")

    def find(self, path: str) -> Path | None:
        """A single file, fetched if need be; None if the repository has none of this name. Raises UserError."""
        if self._root is not None:
            file = self._root / path
            return file if file.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def fetch() -> Path | None:
            try:
                return Path(hf_hub_download(self.name, path, revision=self.revision))
            except LocalEntryNotFoundError:  # offline and not here: that says nothing of what the repository has
                raise
            except EntryNotFoundError:
                return None

        return self._asked_of_hub(fetch)

    def here(self, path: str) -> Path | None:
        """A file of it that is on this machine already. Asks nobody else."""
        if self._root is not None:
            file = self._root / path
            return file if file.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, path, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def expect(self, *pipelines: str, family: str) -> None:
        """Raises UserError unless the repository holds one of these diffusers pipelines."""
        if self._root is not None and not (self._root / INDEX).is_file():
            raise UserError(
                f"The folder `{self._root}` holds no `{INDEX}`.",
                why="a model is loaded from a folder in the diffusers layout: that file, and a sub-folder for each component.",
                mend='set "pretrained_model_name_or_path" to such a folder (not one of its sub-folders) or a hub repository.',
            )
        found = self.json(INDEX).get("_class_name")
        if found not in pipelines:
            raise UserError(
                f"`{self.name}` holds a {found}, but model_family is `{family}`.",
                why=f"that family trains {' or '.join(pipelines)}.",
                mend='set "model_family" to the one of this model, or "pretrained_model_name_or_path" to another model.',
            )

    def component(self, subfolder: str) -> Component:
        """Fetches a component's small files and weights. A component without the wanted variant comes without one.

        "" is the repository's own folder, of a model that is no pipeline.
        """
        if self.variant:
            kinds = (f"*.{self.variant}.safetensors", f"*.{self.variant}-*.safetensors")
            component = Component(self._folder(subfolder, kinds), self.variant)
            if component.weights:
                return component
        return Component(self._folder(subfolder, ("*.safetensors",), leave_out=("*.*.safetensors",)), None)

    def weights(self, subfolder: str) -> Component:
        """A component that must have weights, in the wanted variant if one is wanted. Raises UserError."""
        component = self.component(subfolder)
        if component.weights and component.variant == self.variant:
            return component
        there = sorted({variant_of(path.name) or "" for path in component.folder.glob("*.safetensors")})
        wanted = f"of the variant `{self.variant}`" if self.variant else "without a variant"
        raise UserError(
            f"`{self.name}` has no safetensors weights {wanted} in `{subfolder or '.'}`.",
            why=f"looked in `{component.folder}`; weights in other formats are not loaded, since loading them can run code.",
            mend=f'set "variant" to one that is there: {", ".join(name or "(none)" for name in there)}.' if there else "",
        )

    def verify(self, *subfolders: str) -> None:
        """Raises UserError unless the weights of all these components are here, and whole by their headers."""
        for subfolder in subfolders:
            self.weights(subfolder).verify()

    def fingerprint(self, subfolder: str) -> str:
        """Sixteen hex digits of a component: its small files whole, and samples of every tensor of its weights.

        The same for a folder and for the hub repository it is a copy of; it changes when the content does, not the place.
        """
        component = self.component(subfolder)
        small = {path for kind in SMALL_FILES for path in component.folder.glob(kind) if not is_index(path)}
        digest = hashlib.blake2b(digest_size=8)
        for path in [*sorted(small), *component.weights]:
            digest.update(path.name.encode())
            chunks = sampled(path) if path.suffix == ".safetensors" else iter([path.read_bytes()])
            for chunk in chunks:
                digest.update(chunk)
        return digest.hexdigest()

    def copy(self, folder: Path, *, but: str) -> None:
        """Copies all components except `but` into `folder`, with the index, as a repository without variants."""
        index = self.json(INDEX)
        components = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] and name != but]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.file(INDEX), folder / INDEX)
        for name in components:
            component = self.component(name)
            (folder / name).mkdir(exist_ok=True)
            for path in component.folder.iterdir():
                if path.is_file() and variant_of(path.name) in (None, component.variant) and not is_superseded(path, component):
                    copy_plain(path, folder / name / without_variant(path.name), component.variant)

    def file(self, path: str) -> Path:
        """A small file of it, on this machine; fetched alone. Raises UserError."""
        if self._root is not None:
            return self._root / path
        from huggingface_hub import hf_hub_download

        return Path(self._asked_of_hub(lambda: hf_hub_download(self.name, path, revision=self.revision)))

    def _folder(self, subfolder: str, weights: tuple[str, ...], leave_out: tuple[str, ...] = ()) -> Path:
        if self._root is not None:
            root = self._root
        else:
            from huggingface_hub import snapshot_download

            inside = f"{subfolder}/" if subfolder else ""
            wanted = [f"{inside}{kind}" for kind in (*SMALL_FILES, *weights)]
            unwanted = [f"{inside}{kind}" for kind in leave_out]
            root = Path(
                self._asked_of_hub(
                    lambda: snapshot_download(
                        self.name, revision=self.revision, allow_patterns=wanted, ignore_patterns=unwanted
                    )
                )
            )
        folder = root / subfolder
        if not folder.is_dir():
            raise UserError(
                f"`{self.name}` has no component `{subfolder}`.",
                why=f"looked for `{folder}`.",
                mend="if a download or copy was interrupted, finish it; else choose another model.",
            )
        return folder

    def _asked_of_hub(self, fetch: Callable[[], T]) -> T:
        """`fetch()`, with what can go wrong on the way to the hub said in the user's words."""
        from huggingface_hub.constants import ENDPOINT
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        place = f"`{self.name}`" + (f" (revision `{self.revision}`)" if self.revision else "")
        try:
            return fetch()
        except GatedRepoError as error:
            what, why = f"The hub repository {place} is gated, and your account may not read it.", str(error)
            mend = f"accept its terms at {ENDPOINT}/{self.name}, then log in with `hf auth login`."
        except RepositoryNotFoundError as error:
            what, why = f"{place} is neither a folder here nor a hub repository that you may read.", str(error)
            mend = f"looked for `{Path(self.name).absolute()}` too; mind the spelling, or log in with `hf auth login`."
        except RevisionNotFoundError as error:
            what, why = f"The hub repository `{self.name}` has no revision `{self.revision}`.", str(error)
            mend = 'set "revision" to a branch, tag or commit of it, or leave it out.'
        except LocalEntryNotFoundError as error:
            what, why = f"{place} is not (wholly) on this machine, and the hub cannot be reached.", str(error)
            mend = (
                f"looked for the folder `{Path(self.name).absolute()}` too; go online (HF_HUB_OFFLINE unset) or name a folder."
            )
        except EntryNotFoundError as error:
            what, why = f"The hub repository {place} lacks a file that a diffusers model has.", str(error)
            mend = "choose a repository in the diffusers layout; their names often end in `_diffusers`."
        except (HfHubHTTPError, OSError) as error:
            what, why = f"{place} could not be fetched from the hub.", str(error)
            mend = "try again later; what was fetched so far is kept."
        raise UserError(what, why=why, mend=mend)


def variant_of(name: str) -> str | None:
    """The variant in a weight file's name: `fp16` in `model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors`.

    Indices carry it elsewhere: `model.safetensors.index.fp16.json`.
    """
    found = re.search(r"\.([^.-]+)(?:-\d+-of-\d+)?\.safetensors$", name) or re.search(r"\.index\.([^.]+)\.json$", name)
    return found[1] if found else None


def without_variant(name: str) -> str:
    """A weight file's name with its variant taken out."""
    variant = variant_of(name)
    return name.replace(f".{variant}", "", 1) if variant else name


def is_index(path: Path) -> bool:
    """Whether it lists the shards of weights; it says nothing of their content."""
    return ".safetensors.index." in path.name


def is_superseded(path: Path, component: Component) -> bool:
    """Whether these are weights that the component's variant stands in for, or weights that are not safetensors."""
    is_weights = path.suffix == ".safetensors" or is_index(path)
    if is_weights:
        return variant_of(path.name) != component.variant
    return path.suffix in (".bin", ".msgpack", ".pt", ".ckpt", ".onnx") or path.name.endswith(".bin.index.json")


def copy_plain(source: Path, target: Path, variant: str | None) -> None:
    """Copies a file; an index of shards is rewritten for names without the variant."""
    if not (variant and is_index(source)):
        shutil.copyfile(source, target)
        return
    index = json.loads(source.read_text(encoding="utf-8"))
    index["weight_map"] = {tensor: without_variant(shard) for tensor, shard in index["weight_map"].items()}
    target.write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def verify_file(path: Path) -> None:
    """Raises UserError unless a safetensors file is whole by its header."""
    next(sampled(path))  # what is first yielded is the header, judged


def fingerprint_file(path: Path) -> str:
    """Sixteen hex digits of a lone safetensors file, whatever its name, by samples of its tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for chunk in sampled(path):
        digest.update(chunk)
    return digest.hexdigest()


def sampled(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, and a few bytes from the start, middle and end of each of its tensors."""
    with path.open("rb") as file:
        size = path.stat().st_size
        # Anything may lie there, a page of HTML or a pointer of git-lfs: the first bytes of text are an endless length.
        header = file.read(min(int.from_bytes(file.read(8), "little"), size))
        data_start = file.tell()
        spans = spans_of(header)
        if not spans or data_start + max(end for _, end in spans) != size:
            is_pointer = size < POINTER_BYTES and path.read_bytes().startswith(b"version https://git-lfs")
            raise UserError(
                f"`{path}` is not a whole safetensors file.",
                why="it is a pointer of git-lfs, which stands for the weights until they are pulled." if is_pointer else "",
                mend="fetch the weights with `git lfs pull`."
                if is_pointer
                else "finish its download or copy, or fetch it again.",
            )
        yield header
        for begin, end in spans:
            for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
                file.seek(data_start + offset)
                yield file.read(min(SAMPLE_BYTES, end - offset))


def spans_of(header: bytes) -> list[tuple[int, int]]:
    """Where the tensors of a safetensors file begin and end, counted from the end of its header; none if it is torn."""
    try:
        tensors = json.loads(header)
        spans = [tensor["data_offsets"] for name, tensor in sorted(tensors.items()) if name != "__metadata__"]
        return [(int(begin), int(end)) for begin, end in spans]
    except (ValueError, AttributeError, KeyError, TypeError):  # no JSON, or none of this kind
        return []

"""Libraries without the noise that no user can change: of imports above all."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

from simpletuner.errors import require

__all__ = ["IMAGE_PROCESSORS", "import_model_libraries", "quiet_imports", "require_quietly", "without"]

IMAGE_PROCESSORS = {"transformers.utils.import_utils": "requires torchvision"}
"""Said by pipelines that name a processor of images (transformers 5.23); those by Pillow do as well, and none is used."""

# What is said at import of kernels that nothing here uses. diffusers 0.42.1 and peft 0.21.2 import torchao and bitsandbytes
# wherever they are installed, so everybody with all extras would read it. logger -> what its message holds
NOISE = {
    "torchao": "Failed to load",  # 0.18: C++ parts for other Pythons and other GPUs
    "torch.utils._pytree": "is an Enum subclass",  # torchao 0.18 under torch 2.13
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # 0.50.2: a faster kernel for CPUs
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",  # 0.42.1 looks for old names
    **IMAGE_PROCESSORS,
}


@contextmanager
def without(noise: Mapping[str, str]) -> Iterator[None]:
    """Logger -> words: its messages that hold these words are not shown, inside; anything else is."""
    filters = {logging.getLogger(name): _Without(words) for name, words in noise.items()}
    for logger, each in filters.items():
        logger.addFilter(each)
    try:
        yield
    finally:
        for logger, each in filters.items():
            logger.removeFilter(each)


def quiet_imports() -> AbstractContextManager[None]:
    """For imports that bring in torchao and bitsandbytes: those messages, and only those, are not shown."""
    return without(NOISE)


def import_model_libraries() -> None:
    """diffusers' models and peft, once and quietly; what imports parts of them later finds the noisy ones there."""
    with quiet_imports():
        for name in ("diffusers.models.modeling_utils", "peft"):
            importlib.import_module(name)


def require_quietly(module: str, *, option: str, extra: str) -> ModuleType:
    """As `errors.require`, without the noise."""
    with quiet_imports():
        return require(module, option=option, extra=extra)


class _Without(logging.Filter):
    """Passes all but the messages that hold `words`."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self._words not in record.getMessage()

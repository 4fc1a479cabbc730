"""The one place that imports mosaicml-streaming; everybody else takes its names from here.

`import streaming` pulls in torchvision and transformers for vision data sets, base classes and
tokenizers that this project never touches:

- beside a CPU build of torch, the torchvision wheel fails to load (`operator torchvision::nms does
  not exist`), and takes the whole import down with it;
- transformers loads (a second or more) for two classes that streaming only hands to `isinstance`.

So while streaming is imported, and only then, stand-ins take the place of transformers (unless it
is loaded already) and of a torchvision that is missing or broken. They are removed afterwards:
`import torchvision` elsewhere meets the real package or its real error.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_TORCHVISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)
_TRANSFORMERS = (
    "transformers",
    "transformers.feature_extraction_utils",
    "transformers.models",
    "transformers.models.auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_base",
)


class _StandIn(ModuleType):
    """A module whose every public attribute is an empty class, made when asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


def _torchvision_loads() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError):
        # A failed import leaves its half-loaded submodules behind; the next one must start afresh.
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


@contextmanager
def _stand_ins() -> Iterator[None]:
    names: list[str] = []
    if "streaming" not in sys.modules:
        if not _torchvision_loads():
            names += _TORCHVISION
        if "transformers" not in sys.modules:
            names += _TRANSFORMERS
    sys.modules.update({name: _StandIn(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            if isinstance(sys.modules.get(name), _StandIn):
                del sys.modules[name]


with _stand_ins():
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
    from streaming.base.batching import generate_work
    from streaming.base.dataset import _ShardState as ShardState
    from streaming.base.format.mds.encodings import _encodings
    from streaming.base.storage.download import CloudDownloader, S3Downloader

# Ranks that share samples make it warn, at every start, of its own count of samples. The position
# that a run goes on from is the loader's (data/loader.py), which counts each sample once.
logging.getLogger("streaming.base.dataset").addFilter(
    lambda record: not record.getMessage().startswith("The `replication` arg")
)

# A stranger's corpus could name it as the type of a column, and its samples would be code.
_encodings.pop("pkl", None)


__all__ = [
    "CloudDownloader",
    "MDSWriter",
    "S3Downloader",
    "ShardState",
    "StreamingDataLoader",
    "StreamingDataset",
    "generate_work",
]

"""streaming imports beside any torch, and leaves no stand-in behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path


def run(code: str, *path: Path) -> str:
    prelude = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BROKEN = "import torchvision.half\nraise RuntimeError('operator torchvision::nms does not exist')\n"


def test_a_broken_torchvision_does_not_matter_and_stays_what_it_is(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN)
    (package / "half.py").touch()
    code = """
        import sys
        from data.streaming_shim import MDSWriter, StreamingDataset
        print([m for m in sys.modules if m.split(".")[0] in ("torchvision", "transformers")])
        try:
            import torchvision
        except RuntimeError as e:
            print(e)
    """
    assert run(code, tmp_path) == "[]\noperator torchvision::nms does not exist"


def test_a_torchvision_that_works_is_used(tmp_path: Path) -> None:
    for name, content in {
        "__init__.py": "",
        "datasets.py": "class VisionDataset: ...\nclass CIFAR10: ...\n",
        "transforms/__init__.py": "",
        "transforms/functional.py": "def to_tensor(x): return x\n",
    }.items():
        path = tmp_path / "torchvision" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    code = """
        import sys
        import data.streaming_shim
        import torchvision.datasets
        from streaming.vision.base import VisionDataset
        print(VisionDataset is torchvision.datasets.VisionDataset)
    """
    assert run(code, tmp_path) == "True"


def test_a_transformers_that_is_loaded_already_is_left_alone(tmp_path: Path) -> None:
    for name, content in {
        "__init__.py": "",
        "feature_extraction_utils.py": "class BatchFeature: ...\n",
        "tokenization_utils_base.py": "class BatchEncoding: ...\n",
        "models/__init__.py": "",
        "models/auto/__init__.py": "",
        "models/auto/tokenization_auto.py": "class AutoTokenizer: ...\n",
    }.items():
        path = tmp_path / "transformers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    code = """
        import transformers
        import data.streaming_shim
        import sys
        from transformers.feature_extraction_utils import BatchFeature
        from streaming.base import dataloader
        print(sys.modules["transformers"] is transformers, dataloader.BatchFeature is BatchFeature)
    """
    assert run(code, tmp_path) == "True True"

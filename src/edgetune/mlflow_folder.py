"""Base models in MLflow's layout, as the registries of Azure ML keep them: weights and tokenizer apart."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = "MLmodel"
_PARTS = ("model", "components/tokenizer", "data/model", "data/tokenizer", "data/config", "data")
"""Today's folders, then those of older models. Of two files with the same name the first one counts."""


@contextmanager
def flat(source: Path) -> Iterator[Path]:
    """Give a folder with all files of a model side by side: ``source`` itself unless it is an MLflow model."""
    root = next((path.parent for pattern in (_MARK, f"*/{_MARK}") for path in sorted(source.glob(pattern))), None)
    if root is None or (source / "config.json").is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in _PARTS:
            for path in sorted((root / part).glob("*")):
                link = Path(folder) / path.name
                if path.is_file() and not link.is_symlink():
                    link.symlink_to(path.absolute())
        yield Path(folder)

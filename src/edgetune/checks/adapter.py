"""Check that the adapter beside an exported model is the one that was trained."""

from pathlib import Path

from edgetune import adapters
from edgetune.checks.merge import MergeFindings
from edgetune.merge import Adapter


def compare_adapter(trained: Path, path: Path) -> MergeFindings:
    """Compare every matrix of the file at ``path`` with the trained adapter in a folder."""
    adapter = Adapter(trained)
    _, matrices = adapters.read(path)
    names = sorted(adapter.names)
    expected = adapters.tensors(adapter, names, str(next(iter(matrices.values())).dtype))
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - matrices.keys())]
    wrong += [f"{name} was not trained" for name in sorted(matrices.keys() - expected.keys())]
    wrong += [
        f"{name} is not what was trained"
        for name in sorted(expected.keys() & matrices.keys())
        if matrices[name].tobytes() != expected[name].tobytes()
    ]
    zero = sum(not adapter[name].b.any() for name in names)
    return MergeFindings(matrices=len(names), wrong=wrong, zero=zero)

"""What lies at a path: a store, a selection, a shard corpus or a checkpoint."""

from pathlib import Path
from typing import Literal

Kind = Literal["store", "selection", "shards", "checkpoint"]


def kind_of(path: str | Path) -> Kind:
    """Tell by the files that each kind always has; what is none of the others is opened as a store.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    """
    from txfm_data.address import exists, is_remote, join

    if is_remote(path):
        return "shards" if exists(join(path, "manifest.json")) else "store"
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: nothing there; give the path of a store, a selection, a shard folder or a checkpoint"
        )
    if (path / "manifest.json").is_file():
        return "shards"
    if (path / "config.json").is_file() or (path / "model.safetensors").is_file():
        return "checkpoint"
    if (path / "selection.json").is_file():
        return "selection"
    return "store"

"""Where a checkpoint comes from: commit, package versions, configuration without secrets."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from txfm_model.config import TrainConfig, config_to_dict

PACKAGES = ("txfm", "torch", "numpy", "numba", "pyarrow", "webdataset", "accelerate", "safetensors")


def describe_origin(config: TrainConfig, corpus_fingerprint: str) -> dict[str, Any]:
    """Plain values for config.json of a checkpoint."""
    training = config_to_dict(config)
    for name in ("shards", "out", "init", "resume"):
        if training[name] is not None:
            training[name] = without_secrets(training[name])
    return {
        "corpus_fingerprint": corpus_fingerprint,
        "commit": git_commit(),
        "versions": package_versions(),
        "training": training,
    }


def without_secrets(url: str) -> str:
    """URL without user, password, query and fragment, where secrets stand; a path as it is."""
    parts = urlsplit(url)
    if "://" not in url or parts.scheme == "file":
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> str | None:
    """Commit of the checkout this runs from, with "-dirty" after local changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:  # installed inside somebody else's repository
            return None
        return _git(root, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()

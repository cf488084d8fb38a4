"""Publish a model on the Hugging Face Hub, as the checkpoint that `from_pretrained` opens there."""

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HTTPError

if TYPE_CHECKING:
    from txfm_model.model import TxFM

_LONGEST_REASON = 600
"""Characters of what the Hub or the network says; a proxy may answer with a page."""


def push_to_hub(
    model: "TxFM",
    repo_id: str,
    *,
    commit_message: str = "Add TxFM checkpoint",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    ignore_patterns: list[str] | None = None,
) -> CommitInfo:
    """Upload a model as one commit; see `TxFM.push_to_hub`, which has the same arguments.

    The mixin's own method is not used: it does not make the branch it is given, and says of a failed upload only which
    file it was.
    """
    from txfm_model.checkpoint import save_checkpoint

    broken = [name for name, weights in model.state_dict().items() if not torch.isfinite(weights).all()]
    if broken:
        raise ValueError(f"{repo_id}: NaN or infinite weights in {', '.join(broken[:5])}; nothing was uploaded")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="txfm-hub-") as scratch:
        folder = save_checkpoint(model, Path(scratch) / "checkpoint")
        with _explained(f"{repo_id}: cannot be created or written to", token):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if branch is not None and branch != "main":
                api.create_branch(repo_id, branch=branch, exist_ok=True)
        with _explained(
            f"{repo_id}: the upload broke off. What is on the Hub changes by the commit at the end alone, so it is whole; push "
            f"again, files that have arrived are not sent twice. The reason",
            token,
        ):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                ignore_patterns=ignore_patterns,
            )


@contextmanager
def _explained(failure: str, token: str | None) -> Iterator[None]:
    """Turn what the client raises into one OSError that says what failed, without token or signed addresses.

    The client's own errors are not chained: they hold the address of the storage with its signature.
    """
    try:
        with warnings.catch_warnings():
            # vocabulary.parquet belongs to the model
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            yield
    except (HTTPError, OSError, RuntimeError) as error:  # HTTPError: also of the network; RuntimeError: of a file
        reasons: list[str] = []
        cause: BaseException | None = error
        while cause is not None and len(reasons) < 3:
            reasons.append(" ".join(str(cause).split()) or type(cause).__name__)
            cause = cause.__cause__
        said = re.sub(r"\?[^\s'\"]*", "", " ".join(reasons))
        if token:
            said = said.replace(token, "<token>")
        raise OSError(f"{failure}: {said[:_LONGEST_REASON]}") from None

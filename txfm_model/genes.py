"""The two vectors of each gene that a model holds: row of the codebook and row of the gene head."""

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from txfm_model.model import TxFM


def export_genes(model: TxFM, path: str | Path) -> dict[str, Any]:
    """Write both gene matrices as parquet: gene_id, symbol, codebook and head (fixed-size lists of float32).

    The codebook is what the encoder looks up; the head is the weight of the last layer without its bias. Row
    number is the token id. The fingerprint of the vocabulary stands in the file's metadata.

    Returns
    -------
    dict
        path, genes, codebook_width, head_width, vocabulary_fingerprint.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name or remove it")
    codebook_GE, head_GD = model.tokens.codebook, model.head.weight
    table = pa.table(
        {
            "gene_id": pa.array(model.vocabulary.gene_ids, pa.string()),
            "symbol": pa.array(model.vocabulary.symbols, pa.string()),
            "codebook": _rows(codebook_GE),
            "head": _rows(head_GD),
        },
        metadata={"txfm.vocabulary_fingerprint": model.vocabulary.fingerprint},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.{uuid4().hex[:8]}.partial"
    try:
        pq.write_table(table, staging)
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    return {
        "path": str(path),
        "genes": len(model.vocabulary),
        "codebook_width": codebook_GE.shape[1],
        "head_width": head_GD.shape[1],
        "vocabulary_fingerprint": model.vocabulary.fingerprint,
    }


def _rows(matrix: Tensor) -> pa.FixedSizeListArray:
    values = matrix.detach().float().cpu().contiguous().numpy()
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

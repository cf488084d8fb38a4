"""The gene matrices leave the model as they are."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from txfm_model.config import ModelConfig
from txfm_model.genes import export_genes
from txfm_model.model import TxFM


@pytest.mark.parametrize(("tokens", "codebook_width"), [("concat_project", 16), ("concat", 15)])
def test_round_trip(vocabulary, tmp_path, tokens, codebook_width):
    model = TxFM(ModelConfig(width=16, blocks=1, heads=2, tokens=tokens), vocabulary)
    result = model.genes(tmp_path / "new" / "genes.parquet")  # which is `export_genes`
    assert (result["genes"], result["codebook_width"], result["head_width"]) == (40, codebook_width, 16)
    table = pq.read_table(tmp_path / "new" / "genes.parquet")
    assert table["gene_id"].to_pylist() == list(vocabulary.gene_ids)
    assert table["symbol"].to_pylist() == list(vocabulary.symbols)
    for name, matrix in (("codebook", model.tokens.codebook), ("head", model.head.weight)):
        np.testing.assert_array_equal(np.array(table[name].to_pylist(), np.float32), matrix.detach().numpy())
    assert table.schema.metadata[b"txfm.vocabulary_fingerprint"].decode() == vocabulary.fingerprint
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["genes.parquet"]


def test_a_taken_name_is_refused(tiny_model, tmp_path):
    (tmp_path / "genes.parquet").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another name"):
        export_genes(tiny_model, tmp_path / "genes.parquet")
    assert (tmp_path / "genes.parquet").read_text() == "mine"

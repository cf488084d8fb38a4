"""Sources into the store: match genes, check every value, write blocks, and commit all or nothing.

One function a kind of source, as the verbs of ``txfm ingest``: `h5ad`, `tenx`, `census`, `gct`, `star`, `table`; and `many` for
several at once.
"""

from txfm_data.ingest.blocks import check_counts
from txfm_data.ingest.kinds import census, gct, h5ad, many, star, table, tenx
from txfm_data.ingest.options import IngestOptions
from txfm_data.ingest.run import library_sizes

__all__ = ["IngestOptions", "census", "check_counts", "gct", "h5ad", "library_sizes", "many", "star", "table", "tenx"]

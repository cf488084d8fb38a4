"""The corpus you query: a Census-shaped TileDB-SOMA collection of ragged sparse samples (docs/format_store.md)."""

"""WebDataset shards of ragged samples, and an ordered, resumable stream of masked batches from them."""

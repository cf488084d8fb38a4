"""What the shards and their stream cost, measured: `txfm bench`."""

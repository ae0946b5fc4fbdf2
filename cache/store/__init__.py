"""How a cache is stored: arrays, shards, commits, leases, and the places that they lie in."""

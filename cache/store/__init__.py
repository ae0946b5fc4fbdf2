"""What is stored of a cache: arrays, shards, commits, leases, and the places that they lie in."""

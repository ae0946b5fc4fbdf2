"""Who made a cache: signatures beside it, and the keys that a reader trusts."""

"""Where a run's figures go, a line an epoch: a file a logger."""

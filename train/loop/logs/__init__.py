"""Where a run's figures go: a line for each epoch, a file for each logger."""

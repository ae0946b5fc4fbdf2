"""Ensembles: one cache of the mean of several teachers' answers."""

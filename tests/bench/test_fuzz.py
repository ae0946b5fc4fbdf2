"""A short run of bench/fuzz.py: what every parser does with damaged and forged input."""

import warnings

from kdcache.tests.helpers.places import bench_script


def test_damaged_input_is_read_as_before_or_refused_in_one_line():
    fuzz = bench_script("fuzz")
    names = [name for name, parser in fuzz.PARSERS.items() if not parser.slow]
    chosen = fuzz.shares(300, 10**6, names)
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where threads are: those are meant here
        tallies = fuzz.run(chosen, 1, said.append)
    assert tallies.keys() == set(names)
    assert all(tallies[parser.name].done == len(seeds) for parser, seeds in chosen.items()), said
    assert not [tally.kept for tally in tallies.values() if tally.findings], "\n".join(said)

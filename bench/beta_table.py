"""Writes the tables of the Beta distribution that mixing weights are drawn from: pipeline/views/operations/beta.py.

    python bench/beta_table.py [--out FILE]

scipy's distribution function in float64, rounded to 2^-32: machines and versions of scipy can differ in the last bits,
and the weights of a view must not. So the tables are committed, and run through once.
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
from scipy.stats import beta

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 4.0)
HEAD = '''"""Tables of Beta(alpha, alpha), from which mixing weights are drawn. bench/beta_table.py makes this file.

THRESHOLDS[alpha] has, for k = 0..127, the probability that a draw, rounded to 1/256, is at most k/256, in 2^-32. The
other half follows from the symmetry of the distribution.
"""
'''


def thresholds(alpha: float) -> np.ndarray:
    """int64 [128]."""
    return np.rint(beta.cdf((np.arange(128) + 0.5) / 256, alpha, alpha) * 2**32).astype(np.int64)


def module() -> str:
    rows = [HEAD, "THRESHOLDS = {"]
    for alpha in ALPHAS:
        lines = textwrap.wrap(" ".join(map(str, thresholds(alpha))), 112)
        rows += [f'    {alpha}: """', *(f"        {line}" for line in lines), '    """,']
    return "\n".join([*rows, "}", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = Path(__file__).parents[1] / "pipeline" / "views" / "operations" / "beta.py"
    parser.add_argument("--out", type=Path, default=place)
    parser.parse_args().out.write_text(module())

"""Simulated corpora: several datasets of counts drawn from gene programs whose members are known.

`config` holds sizes and seed; `design` fixes genes, programs, panels and datasets; `counts` draws one block
of samples; `h5ad` streams the blocks of a dataset to a file; `corpus` writes all of them and the truth beside
them. Nothing here is measured data, and every file says so.
"""

from txfm_data.simulate.config import STATEMENT, SimulationConfig
from txfm_data.simulate.corpus import simulate_corpus

__all__ = ["STATEMENT", "SimulationConfig", "simulate_corpus"]

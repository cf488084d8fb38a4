"""Sources, store and curation of ragged sparse RNA-seq samples, and the Numba kernels that prepare them. No torch."""

"""How well an embedding tells cell types apart."""

from txfm_eval.celltype.probe import Split, linear_probe, macro_f1, split_samples

__all__ = ["Split", "linear_probe", "macro_f1", "split_samples"]

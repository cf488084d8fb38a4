"""Samples of any source through a model, in bounded memory and on many processes, into one file that is there whole or not at all.

inputs (what there is to read) -> samples (parts of it) -> encoding (layers, draws) -> staging and over_files (the file); processes
share the parts among them.
"""

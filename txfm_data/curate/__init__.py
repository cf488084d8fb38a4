"""Curation: ordered rules over the datasets of a store, which give a selection and an audit of what each rule did.

`recipe` is what a user writes; `state` is what is left after each rule; `quality`, `label_rules` and `phenoprint` are the rules.
`consistency` is the statistic behind phenoprints (`aligned` prepares cells for it), `embedding` what it is computed on (`pca`, or
`rows` of a model's or a file's). `labels` and `blocks` read obs and counts; `audit` and `figures` tell what happened.
`run` does it all.
"""

"""Corpora as files: where each dataset comes from, how it is read and curated, and what a paper says came out.

`recipe` reads a corpus file, with `entries` and `fields`, which check what it says; `plan` says what is needed and what is there;
`build` ingests and curates, as far as that is not done, and `steps` remembers what each result was made from; `report` compares
what was found with what was expected.
"""

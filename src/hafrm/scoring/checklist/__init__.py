"""The export checklist: what a directory must be so that every consumer gets the same reward from it.

One clause is one function on a `Subject` and one entry in `table.CLAUSES`. Only plain transformers
scores here, whoever trained the model; nothing is changed on disk.
"""

"""Trained models as directories that other software loads, and the proof that it gets the same scores.

`stock_export` writes directories and proves them, `plain_model` scores with plain transformers,
`checklist` verifies any reward directory. Nothing here trains.
"""

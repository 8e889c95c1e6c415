"""Prompt once, two heads: layout, attention, log-probs, model; knows nothing of files or recipes."""

"""A reward model in use: scoring, export and its proof."""

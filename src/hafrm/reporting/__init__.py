"""One page that shows what runs and comparisons found. It reads folders, and nothing else calls into it.

No model code is loaded here: neither torch nor transformers nor scipy. matplotlib and jinja2 come with
the extra `report`.
"""

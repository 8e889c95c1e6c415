"""Compare methods by training each on every training set with every seed, under the same budget.

Each method gets its own learning rate, chosen on validation data; test sets are scored with the model in
memory. Nothing here defines a method or a metric. Start with `method_comparison.compare_methods`;
`study_result` defines what it returns and needs no torch.
"""

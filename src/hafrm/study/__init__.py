"""Methods compared by training them: every method on every training set with every seed, under one budget.

Each method gets its own learning rate, chosen on validation data; test sets and benchmarks are scored with
the model in memory. Nothing here defines a method, a metric or a benchmark. Start with
`method_comparison.compare_methods`; `study_result` has what it returns and needs no torch.
"""

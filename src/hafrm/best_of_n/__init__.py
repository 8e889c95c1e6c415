"""Best of n: several reward models pick among the same candidates, and the picks are compared.

Candidates come from a policy, an endpoint or files. A gold score measures the picks, and a judge compares
them (a judge is always something that compares two answers). Trains nothing. Start at `run_best_of_n`.
"""

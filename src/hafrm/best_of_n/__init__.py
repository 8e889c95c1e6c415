"""Best of n: several reward models pick among the same candidates, and the picks are compared.

Candidates come from a policy, an endpoint or files; picks are measured by a gold score and compared by a
judge, which here always means something that compares two answers. Trains nothing. Start at
`run_best_of_n`.
"""

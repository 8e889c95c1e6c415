"""Models that score: what a directory of weights holds, and the rewards that it gives to responses.

Start at `reward_model.RewardModel`. Nothing here writes a model or computes a metric.
"""

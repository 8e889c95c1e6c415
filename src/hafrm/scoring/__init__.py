"""Models that score: what a directory of weights holds, and the rewards that it gives to responses.

Start at `reward_model.RewardModel`. `loading` finds and loads a run's or a directory's models, `forward`
runs a model over many groups, `fused` adds the scores of two heads. Nothing here writes a model, reads
preference files or computes a metric.
"""

"""Published benchmarks of reward models: their data, their rules, their scores.

RewardBench 1 and 2, PPE, RMB, RM-Bench and JudgeBench, scored exactly as their authors do.
Nothing here is for training, and no row of a benchmark is skipped or repaired. Start with `definitions`;
`benchmark_run.run_benchmarks` runs them for a model.
"""

"""Published benchmarks of reward models: their data, their rules, their scores."""

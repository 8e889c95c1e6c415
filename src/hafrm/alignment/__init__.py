"""What reward models are for: candidates, judges, best of n."""

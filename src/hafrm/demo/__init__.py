"""The embedded default: a made-up preference world, and the comparison that runs on it."""

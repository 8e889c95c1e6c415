"""Methods compared by training them: every method, on every set, with every seed, under one budget."""

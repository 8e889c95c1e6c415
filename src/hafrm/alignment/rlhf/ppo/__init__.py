"""Proximal policy optimisation against reward models, from its terms to its loop."""

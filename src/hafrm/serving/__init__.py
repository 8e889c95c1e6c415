"""Reward servers: `hafrm serve`, and the proof of anybody's server by golden scores.

Start at `protocols.PROTOCOLS`, which both read: what callers send and read, route by route.
"""

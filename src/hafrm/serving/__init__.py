"""Reward servers: `hafrm serve`, and checks of any reward server by golden scores.

Start at `protocols.PROTOCOLS`, which both use: what callers send and read, route by route.
"""

"""Reward servers seen from outside: what they are asked, what they answer, and whether it is right.

Only the standard library is used, so that this works on a machine without torch.
"""

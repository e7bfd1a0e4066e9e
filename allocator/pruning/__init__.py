"""Pruning: the weights of every unit at every level, from calibration text.

- ``pruners``: the local pruners, and the protocol for a new one
- ``calibration``: what pruners are given: inputs, targets and statistics
- ``levels``: pruned units on disk, assembled into weights, and switched in a live model
- ``signals``: signals of the dense model for allocation rules
"""

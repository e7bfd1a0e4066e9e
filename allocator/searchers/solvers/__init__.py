"""Solvers for losses that add up over units.

``space_arrays``  a search space and a budget as arrays, and repair by estimated losses
``knapsack``      the best allocation within limits, nearby or anywhere, and the whole front of one cost
``lagrange``      Lagrangian bounds, and the exact search of what they leave open
"""

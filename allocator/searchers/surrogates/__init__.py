"""Models of the loss that search methods learn.

``surrogate``  the protocol of a model around a centre, and differences of outcomes
``quadratic``  slopes from expansions, and a learned curvature for each unit
``tabular``    an additive model with a few pairs of units, learned from differences alone
``memory``     what a search has measured, its centre, and one of the two models above
``additive``   a Bayesian model of the logarithm of the loss, which Thompson sampling draws from
``shapes``     allocations from a few coefficients, which Bayesian search optimises
"""

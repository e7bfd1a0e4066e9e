"""Search methods: each file has the settings of a method, and its searcher.

``auto``          the searches that learn a model of the loss: ``auto``, ``trust_region`` and ``guided``
``trust_region``  knapsacks near the best allocation, decided by measurements
``guided``        evolution whose proposals a model ranks
``race``          measure entrants on growing token sets, fewer on each
``evolution``     exchange evolution with staged selection
``presets``       published numbers for exchange evolution
``steady``        evolution without generations, for many workers
``sweep``         a front by a chain of budgets
``nsga``          NSGA-II and NSGA-III
``emo_pms``       a front by groups of blocks that evolve side by side
``bayesian``      Optuna's Parzen estimator and Gaussian process over a few coefficients
``thompson``      Thompson sampling of an additive model
"""

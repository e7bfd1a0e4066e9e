"""The search: methods that propose allocations, and the study that runs them and chooses one.

``problem``         what a method is handed, and what its settings offer: the door for a new method
``registry``        the methods by name
``settings``        the keys under ``search``: which method, its budget, and a section for each method's settings
``study``           baselines, search, selection and choice, for one budget or a front
``loop``            ask, measure, record, tell; answers from the journal first
``generator``       searchers written as generators
``coarse_to_fine``  finer ladders for the next round of a search
``hypervolume``     how much of a box the front dominates, batch by batch
``methods/``        the methods, a file for each
``surrogates/``     models of the loss that methods learn
``solvers/``        exact and fast solvers for additive losses
``rules/``          baselines and the field's allocation rules, which need no search

| method | settings under ``search`` | source |
|---|---|---|
| ``auto`` | ``tokens``, ``trust_region``, ``guided`` | the next two in turn |
| ``trust_region`` | ``tokens``, ``trust_region`` | knapsack in a trust region around the best allocation |
| ``guided`` | ``tokens``, ``guided`` | evolution ranked by a model of the loss; Thompson, 1933 |
| ``evolution`` | ``evolution`` | EvoPress, Sieberling et al., ICML 2025, with exact budgets |
| ``evopress`` | ``evolution`` | its published numbers |
| ``darwinlm`` | ``evolution`` | published numbers of DarwinLM, Tang et al., COLM 2026 |
| ``tyr`` | ``evolution`` | published numbers of Týr-the-Pruner, Li et al., NeurIPS 2025 |
| ``steady`` | ``steady`` | ASHA, Li et al., MLSys 2020, with children of the best allocation |
| ``sweep`` | ``tokens``, ``sweep`` | a front: one model of the loss for a chain of budgets |
| ``nsga2`` | ``nsga`` | a front: NSGA-II, Deb et al., 2002, by pymoo |
| ``nsga3`` | ``nsga`` | a front: NSGA-III, Deb and Jain, 2014, by pymoo |
| ``emo_pms`` | ``emo_pms`` | a front: EMO-PMS, Shang et al., 2023 |
| ``tpe`` | ``tpe`` | tree-structured Parzen estimator, Bergstra et al., 2011, by Optuna |
| ``gp`` | ``gp`` | Gaussian process, log expected improvement, Ament et al., 2023, by Optuna |
| ``thompson`` | ``thompson`` | Thompson sampling of an additive model; TuRBO, Eriksson et al., 2019 |
"""

"""The verbs of the package: one file for each. Together they are the Python API, and the command line calls them.

- ``search``        search an allocation or a front, and execute the plan
- ``compare``       compare rules of the field and plans at one budget
- ``inspect``       show the search space of a model, explain what covers it, suggest a family file
- ``alignment``     what aligned widths cost, for ``inspect``
- ``latency``       measure a latency table
- ``open_run``      a run on disk: its front, evaluations, result and plans
- ``prune``         execute a plan
- ``evaluate``      measure a checkpoint
- ``export``        hand a plan to another tool
- ``import_plan``   make a plan of an allocation that another tool chose
- ``submit``        search as a job of a Ray cluster
- ``report``        write the report of a run
- ``evaluators``    the evaluator of a configuration: in this process, or a pool of Ray workers
- ``dense_model``   the model that a plan was made for
"""

"""A run: what it is asked for, what it reads, and what it keeps on disk.

- ``config/``      the configuration: sections, file, options
- ``job``          a configuration and all that was read for it
- ``model``        the dense model of a run, and its search space
- ``prepare``      from a configuration to a job, with every check
- ``directory``    the folder of a run: created, reopened, moved on to the next round
- ``level_store``  the level store of a run
- ``rounds``       from one round of a search to the next
- ``front_file``   ``front.json``
- ``execution``    from a decision to measured checkpoints
- ``result``       ``plan.json`` and ``result.json``
- ``reporting``    progress on the terminal
- ``recorder``     progress in ``status.json``
- ``status``       reading ``status.json``
- ``job_package``  what travels with a job to a cluster
- ``stopping``     what a stopped run says
"""

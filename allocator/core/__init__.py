"""The vocabulary that all other packages share: plain Python and numpy.

``space``            units, ladders, allocations and their exact costs
``costs``            the costs by name, and bounds such as ``params <= 0.5x``
``budget``           limits on costs, and repair of allocations to fill them
``protocols``        requests and outcomes; the protocols of searchers and evaluators
``effort``           what measuring costs, and limits on it
``front``            the Pareto front of outcomes, and its knee
``journal``          the append-only record of a run
``header``           the first line of a journal
``outcomes``         the outcomes of a journal that can be compared, its objectives and its front
``spending``         the effort of a search, and the loss that it reached for it
``training_effect``  how training changed losses, and their order
``plan``             the chosen allocation as a file
``provenance``       plans made from the header of their run
``results``          the formats of ``result.json`` and ``compare.json``
``signals``          numbers of a dense model from which rules allocate
``latency``          latency tables
``files``            atomic files, fingerprints and checks of paths
``strict``           the base of classes that are read from files
``user_objects``     checks of searchers and pruners that users pass from Python
``notify``           callbacks for messages and progress
``errors``           the error that users see
``version``          the version of the package
"""

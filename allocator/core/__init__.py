"""The vocabulary that all other packages share: plain Python and numpy.

``space``      units, ladders, allocations and their exact costs
``costs``      the costs by name, and bounds such as ``params <= 0.5x``
``budget``     limits on costs, and repair of allocations to fill them
``protocols``  requests and outcomes; the protocols of searchers and evaluators
``effort``     what measuring costs, and limits on it
``front``      the Pareto front of outcomes, and its knee
``journal``    the append-only record of a run
``header``     the first line of a journal
``plan``       the chosen allocation as a file
``signals``    numbers of a dense model from which rules allocate
``latency``    latency tables
``files``      atomic files, fingerprints and checks of paths
``notify``     callbacks for messages and progress
``errors``     the error that users see
``version``    the version of the package
"""

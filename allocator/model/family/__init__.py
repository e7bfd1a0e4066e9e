"""Where a model has its units, and what they cost.

- ``schema``         family files: the schema, reading one, finding the one for a model
- ``layout``         ``Layout``: the blocks, the sub-blocks and the tail of one model
- ``sub_blocks``     ``SubBlock``: matrices that lose rows and columns together
- ``checks``         checks of a family file against a model
- ``space``          the search space: units, ladders and exact costs
- ``serving_costs``  costs of serving a workload: multiply-accumulates, bytes, times
- ``draft``          a first draft of a family file, and which line covers which matrix
"""

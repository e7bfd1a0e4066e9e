"""Units at their levels.

- ``compact``: the form in which a pruner returns the levels of a unit
- ``masks``: masks of single weights, packed into bytes
- ``store``: the level store on disk
- ``assemble``: weights of any unit at any level, and a live model that switches between levels
- ``execute``: the checkpoint of an allocation, saved and counted
"""

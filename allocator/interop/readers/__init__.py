"""Files of other tools that plans are imported from.

``ratios``  removed shares by module or by block; a new format is a function and a line in its table
``levels``  levels of EvoPress, Týr-the-Pruner and DarwinLM, and the metadata that gives them a meaning
"""

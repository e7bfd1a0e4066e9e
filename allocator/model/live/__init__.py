"""A model in memory.

- ``load``             loading a model and its tokenizer
- ``walk``             ``BlockWalker``: running a model block by block
- ``stream``           ``StreamedWalker``: the same with one block in memory
- ``write``            writing a pruned checkpoint, reading tensors, counting parameters
- ``modeling_pruned``  the modelling file that is copied next to pruned weights
- ``memory``           returning freed memory to the system
"""

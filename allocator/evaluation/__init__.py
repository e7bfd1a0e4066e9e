"""Measuring allocations against the dense model.

- ``spec``: what an engine is made from, and the protocol of an evaluator
- ``local``: an evaluator in this process
- ``engine``: one live model, switched between allocations and measured
- ``trie``: the order of a batch of allocations, so that shared blocks run once
- ``teacher``: targets of the dense model, kept or recomputed
- ``loss``: the losses
- ``expansion``: slopes and sizes of all levels around an allocation, from one backward pass
- ``training``: the brief training of a candidate
- ``training_states``: trained candidates on disk, from which later stages continue
- ``zeroth_order``: the size of the gradient in each unit, without a backward pass
- ``latency``: times of sub-blocks and of whole models
"""

"""Models: what lies on disk, where the prunable parts are, what a model reads, and a live model.

- ``checkpoint``  a model folder: configuration, tensor headers, kinds, names, hashes
- ``family``      where a model has its units: family files, layouts, search spaces, costs of serving
- ``data``        text and other examples, by split
- ``live``        a model in memory: loading, running block by block, writing a pruned checkpoint
- ``open``        opening a dense model together with its family
"""

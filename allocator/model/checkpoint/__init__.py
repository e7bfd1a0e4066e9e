"""A model folder on disk.

- ``headers``  ``Checkpoint``: the configuration and the headers of all tensors
- ``kinds``    kinds of models: what they read and what they return
- ``names``    names of tensors in the files and in the model
- ``stock``    the class that transformers has for a model
- ``foreign``  refusing adapters, quantised weights and other formats
- ``hashing``  fingerprints of weight files, and comparing tensors byte by byte
"""

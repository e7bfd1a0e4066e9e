"""What a model reads.

- ``examples``  ``Examples``: the one type of a model's input
- ``text``      documents, their splits, and packed token sequences
- ``read``      examples for any kind of model: text, labelled documents, images, pairs
"""

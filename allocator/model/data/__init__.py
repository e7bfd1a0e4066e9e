"""What a model reads.

- ``examples``  ``Examples``: the one type of a model's input
- ``text``      documents, and the split of each name
- ``windows``   the windows of each split
- ``read``      examples for any kind of model: text, labelled documents, images, pairs
"""

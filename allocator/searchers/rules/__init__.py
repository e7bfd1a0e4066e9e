"""Allocations that need no search: the baselines and the field's rules.

``baselines``  uniform, and one rate for attention with one for the rest
``one_shot``   rules that need only signals of the dense model
``measured``   rules that measure the model in several steps, run as searchers
``apportion``  from real-valued sparsities to an allocation at the budget
"""

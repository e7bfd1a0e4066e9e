"""What local pruners are given for every unit, computed from calibration text block by block.

- ``problem``: a model with its text and pruner, and its units in the order of the forward pass
- ``build``: pruning all units on dense, expected or path inputs
- ``streams``: one block in the dense and in the pruned model: inputs and targets
- ``statistics``: norms, moments and Gram matrices of the inputs of a matrix
- ``routing``: gates and outputs of whole experts
- ``factorise``: damped Cholesky factors of Hessians
- ``finite``: a check that statistics are finite
"""

"""The tools that plans are exported to. A new target is a module here, and a line in ``registry``.

================  ==================  ======================================================  ============
target            module              what is written                                         patterns
================  ==================  ======================================================  ============
hf                ``hf``              the checkpoint with ``per_layer_config``; masked        all
                                      plans dense with zeros
hf-padded         ``hf_padded``       a checkpoint of the stock class, padded to the widest   structured
                                      layer
llm-compressor    ``llm_compressor``  ``recipe.yaml`` and ``run.py``                          unstructured,
                                                                                              n:m
torchao           ``torchao``         a list of sparsifiers and ``apply.py``                  unstructured,
                                                                                              n:m
torch-pruning     ``torch_pruning``   ``ratios.json`` and ``apply.py``                        structured
evopress          ``evopress``        levels of matrices, and their meaning                   unstructured
tyr               ``tyr``             levels around the plan, and their meaning               structured
darwinlm          ``darwinlm``        levels of heads and channels, and their meaning         structured
ratios            ``ratios``          ratios of modules and of blocks                         all
optuna            ``optuna``          a study with every evaluation                           all
mlflow            ``mlflow``          a run with a nested run per member of the front         all
================  ==================  ======================================================  ============
"""

"""The local pruners. A new one is a file here and a line in ``PRUNERS``; ``protocol`` says what it provides.

============= =================== ======================== ==========================================================
name          file                patterns                 source
============= =================== ======================== ==========================================================
``obs``       ``obs``             structured               ZipLM (Kurtic et al., 2023), DarwinLM, Týr-the-Pruner;
                                                           its bias: FLAP (An et al., AAAI 2024)
``sparsegpt`` ``sparsegpt``       unstructured, n:m        Frantar & Alistarh, ICML 2023
``wanda``     ``magnitude_wanda`` unstructured, n:m        Sun et al., ICLR 2024
``magnitude`` ``magnitude_wanda`` unstructured, n:m        magnitude of the weights
============= =================== ======================== ==========================================================

The default of a pattern is the first that serves it. The other files:

- ``protocol``: the protocol of a pruner, and the problem that it solves
- ``registry``: the pruners by name, and how one is made
- ``removal``: the greedy OBS order of the items of a unit
- ``experts``: the order of whole experts, by their gates or by the error without them
"""

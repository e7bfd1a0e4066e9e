"""Exchange of plans with other tools.

``contract``      what an export hands over, and what a target does with it
``targets/``      the tools that plans are exported to
``readers/``      files of other tools that plans are imported from
``scripts/``      scripts that exports contain; they run without this package
``matrices``      what a plan keeps of every weight matrix
``weights``       for targets that carry weights: the checkpoint, and sizes in its configuration
``searches``      for targets that show a search
``levels``        for EvoPress, Týr-the-Pruner and DarwinLM: level files
``verification``  the script that compares a checkpoint with the plan
``writing``       helpers for what a target writes
"""

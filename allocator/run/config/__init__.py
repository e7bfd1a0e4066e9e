"""The configuration of a run.

- ``sections``  the sections of a run file, each with its defaults
- ``run``       ``RunConfig``: all of it, and what follows from it
- ``load``      reading a run file, ``run.yaml`` and ``a.b=c`` assignments
- ``options``   ``RunOptions``: the one list of options of the Python API and of the command line
- ``flags``     run options as flags of the command line
- ``reference`` the configuration page of the documentation
"""

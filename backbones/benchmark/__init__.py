"""How fast, how large, how much memory: models measured side by side on one machine.

:func:`.benchmark.benchmark` measures, :mod:`.report` makes tables and JSON of it and :mod:`.plot`
a picture. ``tools/benchmark.py`` does all of it by one command.
"""

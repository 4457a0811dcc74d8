"""Whole models: running a config, from its data to its results.

Needs mmdet or mmseg, depending on the config; the backbone itself needs neither.
"""

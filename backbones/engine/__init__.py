"""Whole models: what the tools do to a config, its data and its results.

Needs mmdet or mmseg, whichever the config is for; the backbone itself needs neither.
"""

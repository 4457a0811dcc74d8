"""Whole models as files that run without this project.

Semantic FPN, RetinaNet, Faster and Mask R-CNN go from pixels to results inside the file:
normalisation, padding, box decoding and non-maximum suppression included. :func:`.export.export`
writes one, :func:`.runner.open_exported` runs one, and :class:`.exported_model.ExportedModel` makes
predictions of what it gives. Packages: ``requirements/export.txt``.
"""

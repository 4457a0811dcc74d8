"""Whole models as files that run without this project.

Semantic FPN, RetinaNet, Faster and Mask R-CNN go from pixels to results inside the file: color
normalization, padding, box decoding and non-maximum suppression included. :func:`.export.export`
writes a file; :mod:`backbones.inference.exported_file` runs it. Packages:
``requirements/export.txt``.
"""

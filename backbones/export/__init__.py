"""Export of whole models to files that run without this project.

A file of Semantic FPN, RetinaNet, Faster or Mask R-CNN computes results from pixels, including
color normalization, padding, box decoding and non-maximum suppression. :func:`.export.export`
writes a file; :mod:`backbones.inference.exported_file` runs it. Packages:
``requirements/export.txt``.
"""

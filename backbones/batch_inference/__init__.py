"""Inference over millions of images and videos on many machines, into a set of Parquet files.

``source.py`` lists the inputs and splits them into units, ``destination.py`` says which units are
done and writes each whole or not at all, and ``job.py`` has Ray share the others out.
"""

"""Inference over millions of images and videos on many machines, into a set of Parquet files."""

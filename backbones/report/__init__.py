"""The report of a test: where a model is right, where it is wrong, and how."""

"""Speed, size and memory of models, measured side by side on one machine."""

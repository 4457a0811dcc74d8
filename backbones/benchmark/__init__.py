"""How fast, how large, how much memory: models measured side by side on one machine."""

"""The parts of tools/install.py; standard library only, since nothing is installed yet."""

"""The one exception that ends an installation."""


class InstallError(Exception):
    """Says in one line what stopped the installation and what to do about it."""

"""What can be wrong with one input, while the others go on."""


class InputError(ValueError):
    """A picture or video that cannot be read; the message says why, its caller knows which."""

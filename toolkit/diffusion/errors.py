"""The one error that a person is meant to read."""


class BadInput(ValueError):
    """Input that cannot be used: one sentence with what was found, what was expected and what to do.

    Every command prints it on stderr without a traceback and exits with code 2.
    """

    __module__ = "fewstep"  # hosts show a type by its module, which in ComfyUI is a path on the disk

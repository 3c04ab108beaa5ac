"""What converting and publishing raise."""


class HubError(RuntimeError):
    """A checkpoint cannot be converted, or a folder not be published: the message says why and what to do."""

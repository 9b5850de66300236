"""Why an item has no result, although its process can go on. Any other exception of an item ends the process."""


class Unavailable(Exception):
    """An item cannot run here; the message has the reason."""


class CheckFailed(Exception):
    """A result is wrong; the message has its error."""

"""What a user would pick instead, written as its own documentation says."""


class NotRun(Exception):
    """A peer that does not run here; the message says why."""

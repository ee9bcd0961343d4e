"""What happens next is said by an exception's type. Anything else that is raised is our own bug.

Each message is for an operator: what happened, to what, and what to do.
"""


class Transient(Exception):
    """It may work later: try again with a growing delay."""


class Misconfigured(Exception):
    """It will never work like this: stop, and name the setting to change."""


class Untrusted(Exception):
    """A signature, digest or number does not hold: never retried, and never used."""


class Shredded(Exception):
    """The study's key was destroyed on purpose: nothing is wrong, and nothing is left to do for it."""

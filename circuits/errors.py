"""The one exception that bad input raises, and the one warning."""


class CircuitsError(ValueError):
    """Bad input, told in one sentence: what was wrong, where, and what would be right.

    The command line prints the sentence and exits with code 2.

    Example:
        >>> from circuits import Head
        >>> Head.parse("banana")
        Traceback (most recent call last):
        circuits.errors.CircuitsError: 'banana' is not a head: write layer and head as in L21H17
    """


class CircuitsWarning(UserWarning):
    """What was asked for is done, but may not mean what it seems to: one sentence says why."""

"""Keep libraries' warnings, log lines and progress bars off the user's screen."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers, datasets and TransformerLens say on loading, for the length of the block."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    root = logging.getLogger()
    level = root.level
    # every change of a level empties the caches of all loggers: a block inside another changes none
    loud = (verbosity, level, bars) != (logging.ERROR, logging.ERROR, False)
    if loud:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if loud:
            root.setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()

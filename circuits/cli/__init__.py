"""The command line: nothing but calls to the other rooms."""

import os
import sys
import warnings
from typing import Any


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"circuits: {message}\n")


def main() -> None:
    """Run ``circuits``: bad input ends with one sentence and exit code 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from circuits.errors import CircuitsError, CircuitsWarning

    warnings.filterwarnings("ignore")
    warnings.simplefilter("always", CircuitsWarning)
    warnings.showwarning = _warn

    from circuits.cli.app import app

    try:
        app()
    except CircuitsError as error:
        sys.stderr.write(f"circuits: {error}\n")
        sys.exit(2)
    except OSError as error:
        sys.stderr.write(
            f"circuits: {error.filename or 'a file'} cannot be written or read: {error.strerror or error}\n"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("circuits: interrupted; what was finished is on disk\n")
        sys.exit(130)

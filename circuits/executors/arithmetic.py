"""The same arithmetic wherever a job runs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Inside the block, torch computes on so many threads and takes numbers too small for full precision as zero.

    Afterwards it does as before. Numbers are rounded otherwise on more threads.

    Example:
        >>> import torch
        >>> with on_threads(1):
        ...     torch.get_num_threads()
        1
    """
    import torch

    before = torch.get_num_threads()
    flushed = not bool(torch.full((1,), 1e-39).mul(0.5).any())
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(flushed)

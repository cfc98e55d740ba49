"""How much is computed at once, and what happens if memory does not suffice: the examples are halved.

Half precision on a processor without instructions for it is computed in float32.
"""

from collections.abc import Callable, Sequence

import torch

from circuits.errors import CircuitsError
from circuits.models import LeanModel, Model, checkpoint_of

#: Tokens in one tensor of rows on a CPU. More fall out of its cache, fewer do not fill its pipelines.
TOKENS = 2048


def token_budget(lean: LeanModel) -> int:
    """How many tokens to compute at once: what a CPU's cache likes, or what fits an eighth of a GPU's memory."""
    if lean.device.type != "cuda":
        return TOKENS
    layout = lean.layout
    # the clean run keeps streams, z, keys and values; rows need a layer's projections and neurons at a time
    kept = layout.n_layers * (layout.d_model + (layout.n_heads + 2 * layout.n_groups) * layout.d_head)
    numbers = kept + 12 * layout.d_model + 4 * layout.d_mlp
    # of all its memory, not of what is free: rounding must not depend on what else runs
    memory: int = torch.cuda.get_device_properties(lean.device).total_memory
    return max(TOKENS, memory // 8 // (numbers * lean.dtype.itemsize))


def arithmetic(model: Model) -> torch.dtype:
    """The dtype to compute in: the model's, or float32 on a processor without instructions for a half-precision one.

    There half precision is emulated: several times slower than float32, and less exact.
    """
    some = next(iter(checkpoint_of(model).tensors.values()))
    dtype = some.dtype
    if some.device.type != "cpu" or dtype == torch.float32:
        return dtype
    known = torch.cpu.get_capabilities()
    names = ("amx_bf16", "avx512_bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16")
    return dtype if any(known.get(name) for name in names) else torch.float32


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice."""
    said = ("not enough memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in said)


def in_halves(batches: Sequence[list[int]], work: Callable[[list[int]], None], name: str) -> None:
    """Do some work for each batch of examples; a batch that memory does not suffice for is done in two halves.

    Args:
        batches: the examples of each.
        work: leaves nothing behind if it fails.
        name: of the task that the examples belong to.

    Raises:
        CircuitsError: memory does not suffice for one example.

    Example:
        >>> done = []
        >>> def work(examples):
        ...     if len(examples) > 2:
        ...         raise MemoryError
        ...     done.append(examples)
        >>> in_halves([[0, 1, 2], [3]], work, "qa")
        >>> done
        [[0], [1, 2], [3]]
    """
    waiting = list(batches)
    while waiting:
        examples = waiting.pop(0)
        try:
            work(examples)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(examples) == 1:
                raise CircuitsError(f"memory does not suffice to run one example of {name} alone") from None
            half = len(examples) // 2
            waiting[:0] = [examples[:half], examples[half:]]

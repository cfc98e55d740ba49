"""Where a worker finds a model."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from circuits.errors import CircuitsError
from circuits.models.checkpoint import Model, checkpoint_of
from circuits.models.fingerprints import fingerprint, fingerprint_of
from circuits.models.huggingface import load_huggingface


class Place(NamedTuple):
    """A folder that workers load a model from, and what they must find there.

    Attributes:
        folder: of the checkpoint, or of the adapter that names it as its base.
        model: the `circuits.models.fingerprint` it must have; None if any model will do.
    """

    folder: str
    model: str | None = None

    @classmethod
    def of(cls, source: str | Path | Model) -> "Place":
        """The place of a checkpoint, or of a model that was loaded from one.

        Raises:
            CircuitsError: the model was loaded from no folder, or the folder is gone.
        """
        if not isinstance(source, nn.Module):
            return cls(str(Path(source).absolute()))
        checkpoint = checkpoint_of(source)
        folder = checkpoint.adapter or checkpoint.source
        if not Path(folder).is_dir():
            raise CircuitsError("a model in memory cannot be sent to workers: save it, and give its folder")
        return cls(str(Path(folder).absolute()), fingerprint(source))

    def load(self, dtype: str, device: str | None = None) -> Model:
        """Load what is there.

        Raises:
            CircuitsError: as `circuits.load_model`, or it is another model.
        """
        from circuits.models.loading import load_model  # which takes seconds to import

        model = load_model(self.folder, dtype, device)
        self._check(fingerprint(model))
        return model

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a folder that holds another model, without making a hookable one of it.

        Raises:
            CircuitsError: the checkpoint cannot be read, or is another model.
        """
        found = load_huggingface(self.folder, dtype)
        self._check(fingerprint_of(found.config, dict(found.named_parameters())))

    def _check(self, found: str) -> None:
        if self.model not in (None, found):
            raise CircuitsError(
                f"the checkpoint in {self.folder} is not the model that was given, or another machine has another one "
                "there: save the model and give its folder"
            )

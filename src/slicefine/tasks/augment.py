"""RandAugment (Cubuk et al. 2020) with Pillow: a few random changes, all of one magnitude.

Operations, ranges and defaults (2 operations of magnitude 9 out of 30) are those of torchvision's RandAugment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .settings import TaskSettings

__all__ = ["Augmentation", "OPERATIONS", "RandAugment", "augmentation"]

# pictures (the frames of one video are changed alike) -> pictures
Augmentation = Callable[[list[Any]], list[Any]]
LEVELS = 30  # magnitudes go from 0 to here


def augmentation(task: TaskSettings) -> Augmentation | None:
    """What the settings ask for, None for nothing."""
    return RandAugment() if task.augment == "randaugment" else None


class RandAugment:
    """Draw operations, with replacement, and apply them one after the other.

    Random numbers are torch's: a run's seed decides, and each data loader worker draws its own.

    Args:
        operations: how many.
        magnitude: how strong, from 0 to 30.

    Example:
        >>> from PIL import Image
        >>> [picture] = RandAugment()([Image.new("RGB", (8, 8))])
        >>> picture.size
        (8, 8)
    """

    def __init__(self, operations: int = 2, magnitude: int = 9) -> None:
        self.operations, self.magnitude = operations, magnitude

    def __call__(self, pictures: list[Any]) -> list[Any]:
        """Change RGB pictures, all of them in the same way."""
        names = list(OPERATIONS)
        for _ in range(self.operations):
            operation = OPERATIONS[names[int(torch.randint(len(names), ()))]]
            strength = self.magnitude / LEVELS * (1 if bool(torch.rand(()) < 0.5) else -1)
            pictures = [operation(picture, strength) for picture in pictures]
        return pictures


def _affine(picture: Any, a: float, b: float, c: float, d: float) -> Any:
    """Shear by a and b, and shift by c and d; what comes in from outside is black."""
    from PIL import Image

    matrix = (1, a, c, b, 1, d)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _shear_x(picture: Any, strength: float) -> Any:
    return _affine(picture, 0.3 * strength, 0, 0, 0)


def _shear_y(picture: Any, strength: float) -> Any:
    return _affine(picture, 0, 0.3 * strength, 0, 0)


def _shift_x(picture: Any, strength: float) -> Any:
    return _affine(picture, 0, 0, int(150 / 331 * picture.width * strength), 0)


def _shift_y(picture: Any, strength: float) -> Any:
    return _affine(picture, 0, 0, 0, int(150 / 331 * picture.height * strength))


def _rotate(picture: Any, strength: float) -> Any:
    return picture.rotate(30 * strength)


def _enhance(name: str) -> Callable[[Any, float], Any]:
    def apply(picture: Any, strength: float) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(picture).enhance(1 + 0.9 * strength)

    return apply


def _posterize(picture: Any, strength: float) -> Any:
    from PIL import ImageOps

    return ImageOps.posterize(picture, 8 - round(4 * abs(strength)))


def _solarize(picture: Any, strength: float) -> Any:
    from PIL import ImageOps

    return ImageOps.solarize(picture, round(255 * (1 - abs(strength))))


def _autocontrast(picture: Any, strength: float) -> Any:
    from PIL import ImageOps

    return ImageOps.autocontrast(picture)


def _equalize(picture: Any, strength: float) -> Any:
    from PIL import ImageOps

    return ImageOps.equalize(picture)


def _identity(picture: Any, strength: float) -> Any:
    return picture


# name -> (picture, strength from -1 to 1) -> picture; the sign is a direction, or of no effect
OPERATIONS: dict[str, Callable[[Any, float], Any]] = {
    "identity": _identity,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "shift_x": _shift_x,
    "shift_y": _shift_y,
    "rotate": _rotate,
    "brightness": _enhance("Brightness"),
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "sharpness": _enhance("Sharpness"),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}

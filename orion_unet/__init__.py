"""Spatial U-Net that predicts multiplexed immunofluorescence from H&E.

From Python, a trained model is used in three lines::

    import orion_unet
    model = orion_unet.load_model("runs/demo")  # a run's folder, or a checkpoint
    markers = orion_unet.predict(he, model)     # (H, W, 3) to (C, H, W) float32, in the order of model.names

and its cells are measured in one more::

    cells = orion_unet.quantify(markers, names=model.names)  # cells.mean is (n, C), cells.y and cells.x are (n,)

All are imported when they are first asked for: importing the package alone loads neither torch nor numpy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "predict", "quantify"]

# Public name: module and name inside.
_LAZY = {
    "load_model": ("inference.model", "load_trained"),
    "predict": ("inference.predict", "predict"),
    "quantify": ("quantification.cells", "quantify"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inner = _LAZY[name]
    return getattr(import_module(f"{__name__}.{module}"), inner)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

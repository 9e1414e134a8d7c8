"""Nuclei in a nuclear marker, by the same steps in ``evaluate`` (whole cores) and ``quantify`` (tiles of any image)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orion_unet.data.channels import nuclear_channel
from orion_unet.errors import InputError

# Of the smoothing before the threshold, in pixels (ORION: 0.325 um each).
SMOOTHING_SD = 1.0
# A nuclear image whose brightest and darkest part differ by less than this, of the normalised range, shows none.
LEAST_CONTRAST = 0.05
# Smallest nucleus in pixels, and least distance of the centres of two.
LEAST_PIXELS, LEAST_DISTANCE = 20, 4
# Nuclei are grown by so many pixels, where they do not meet: membrane markers stand around the nucleus, not in it.
GROWTH = 3
# Bins of the histogram from which Otsu's threshold follows, as in scikit-image.
OTSU_BINS = 256


def nuclear_marker(names: Sequence[str], given: str | None, instead: str) -> int:
    """Index of the marker that stains nuclei: the one given, or the one whose name says so.

    ``instead`` ends the message of the InputError raised where there is none: what to do without a nuclear marker.
    """
    if given is not None:
        if given not in names:
            raise InputError(f"--nuclear_marker {given}: is not among the markers, {', '.join(names)}")
        return list(names).index(given)
    found = nuclear_channel(names)
    if found is not None:
        return found
    raise InputError(
        f"no marker is named like a nuclear stain ({', '.join(names)}): name one with --nuclear_marker, or {instead}"
    )


def segment_nuclei(image: np.ndarray) -> np.ndarray:
    """Nuclei (H, W) int32, numbered from 1 and 0 outside, in a nuclear marker (H, W) in [0, 1].

    Gaussian smoothing, Otsu's threshold, a watershed of the distance to the background from its maxima, and growth by
    GROWTH pixels.
    """
    from skimage.filters import threshold_otsu

    smooth = smoothed(image)
    if np.ptp(smooth) < LEAST_CONTRAST:
        return np.zeros(image.shape, np.int32)
    return grown(nuclei_above(smooth, threshold_otsu(smooth, OTSU_BINS)))


def smoothed(image: np.ndarray) -> np.ndarray:
    """The nuclear marker (H, W) as float32, smoothed; a pixel depends on those up to 4 pixels away."""
    from scipy.ndimage import gaussian_filter

    smooth: np.ndarray = gaussian_filter(image.astype(np.float32), SMOOTHING_SD)
    return smooth


def nuclei_above(smooth: np.ndarray, threshold: float) -> np.ndarray:
    """Nuclei (H, W) int32, numbered from 1, of the smoothed marker (H, W) above a threshold, before they grow."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter
    from skimage.feature import peak_local_max
    from skimage.segmentation import watershed

    inside = smooth > threshold
    distance = gaussian_filter(distance_transform_edt(inside).astype(np.float32), SMOOTHING_SD)
    centres = peak_local_max(distance, min_distance=LEAST_DISTANCE, exclude_border=False, labels=inside.astype(int))
    seeds = np.zeros(smooth.shape, np.int32)
    seeds[tuple(centres.T)] = np.arange(1, len(centres) + 1)
    labels = watershed(-distance, seeds, mask=inside)
    small = np.bincount(labels.ravel()) < LEAST_PIXELS
    small[0] = True
    numbers = np.cumsum(~small) * ~small
    return numbers[labels].astype(np.int32)


def grown(labels: np.ndarray) -> np.ndarray:
    """The nuclei, each larger by GROWTH pixels where that meets no other."""
    from skimage.segmentation import expand_labels

    return expand_labels(labels, GROWTH)

"""Rewrites a folder of .npy pairs as OME-TIFF or OME-Zarr, value for value the same."""

from pathlib import Path

import numpy as np

# By name: the suffix, and how the writer stores the H&E and the markers. Tiles are smaller than a core on purpose.
TIFFS = {
    "zstd": {"compression": "zstd"},
    "deflate": {"compression": "zlib", "predictor": True},
    "lzw": {"compression": "lzw"},
    "plain": {"compression": None},
    "jpeg2000": {"compression": "jpeg2000"},
    "big-endian": {"compression": "zlib"},
}
ZARRS = {
    "v3": {"zarr_format": 3},
    "v3 shards": {"zarr_format": 3, "shards": True},
    "v3 blosc": {"zarr_format": 3, "codec": "blosc"},
    "v2 blosc": {"zarr_format": 2, "codec": "blosc"},
    "v2 zlib": {"zarr_format": 2, "codec": "zlib"},
}


def rewrite(folder, target, form, keep_npy=()):
    """The pairs of ``folder`` in ``target`` in a format; cores in ``keep_npy`` stay as they are. Returns ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(folder).iterdir()):
        core, _, kind = path.stem.rpartition("_")
        if path.suffix != ".npy" or core in keep_npy:
            (target / path.name).write_bytes(path.read_bytes())
        elif form in TIFFS:
            write_tiff(target / f"{core}_{kind}.ome.tif", np.load(path), form)
        else:
            write_zarr(target / f"{core}_{kind}.ome.zarr", np.load(path), **ZARRS[form])
    return target


def write_tiff(path, image, form="zstd", tile=(32, 32), levels=1, **options):
    """(H, W, C) as OME-TIFF: the H&E interleaved, markers a page each; each further level takes every second pixel."""
    import tifffile

    options = {**TIFFS.get(form, {}), "tile": tile, **options}
    order = ">" if form == "big-endian" else "<"
    with tifffile.TiffWriter(path, ome=True, byteorder=order) as writer:
        for level in range(levels):
            step = 2**level
            pixels = np.ascontiguousarray(image[::step, ::step])
            options["subifds"] = levels - 1 if level == 0 else 0
            if level:
                options["subfiletype"] = 1
            if image.shape[2] == 3 and "_HE" in path.name:
                writer.write(pixels, photometric="rgb", metadata={"axes": "YXS"} if not level else None, **options)
            else:
                pixels = pixels.transpose(2, 0, 1)
                meta = {"axes": "CYX"} if not level else None
                writer.write(pixels, photometric="minisblack", metadata=meta, **options)


def write_zarr(path, image, zarr_format=3, codec="zstd", shards=False, levels=1, chunk=32, axes="cyx"):
    """(H, W, C) as OME-Zarr; each further level takes every second pixel."""
    import numcodecs
    import zarr

    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    compressors = {
        (3, "zstd"): "auto",
        (3, "blosc"): zarr.codecs.BloscCodec(cname="zstd"),
        (2, "blosc"): numcodecs.Blosc("lz4"),
        (2, "zlib"): numcodecs.Zlib(),
    }[zarr_format, codec]
    for level in range(levels):
        pixels = image[:: 2**level, :: 2**level]
        pixels = pixels if axes == "yxc" else pixels.transpose(2, 0, 1)
        side = (3 if "_HE" in path.name else 1,) if axes == "cyx" else ()
        chunks = (*side, chunk, chunk) if axes == "cyx" else (chunk, chunk, image.shape[2])
        outer = (*side, 2 * chunk, 2 * chunk) if shards else None
        array = group.create_array(
            str(level), shape=pixels.shape, dtype=image.dtype, chunks=chunks, shards=outer, compressors=compressors
        )
        array[:] = pixels
    described = {
        "axes": [{"name": name, "type": "channel" if name == "c" else "space"} for name in axes],
        "datasets": [{"path": str(level)} for level in range(levels)],
    }
    if zarr_format == 3:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [described]}
    else:
        group.attrs["multiscales"] = [{"version": "0.4", **described}]


def spoil_tile(path, page=0, index=0):
    """Overwrite the stored bytes of a tile of an OME-TIFF."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        plane = tiff.series[0].pages[page]
        offset, count = plane.dataoffsets[index], plane.databytecounts[index]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\x55" * count)

"""An index of a commit for people: its cut arrays as one virtual dataset each.

h5py and h5dump show such a dataset as if it were in one piece. A source that is missing reads as
zeros there without a word, so nothing in this package ever reads an index.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from recovery.cuts import piece_shape
from recovery.disk import Disk
from recovery.shards import hdf5_type, write_image
from recovery.state import dtype_from_json

__all__ = ["write_index"]


def write_index(disk: Disk, path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write a new HDF5 file beside the shards, durable but for its name; returns its record.

    Raises
    ------
    OSError
        The disk refused. The file may be there.
    """

    def fill(file: h5py.File) -> None:
        for entry in manifest["arrays"]:
            if "cut" in entry and math.prod(entry["shape"]):
                _add(file, entry, manifest["shards"])

    attributes = {"hopcoll": "index of a checkpoint, for people: missing shards read as zeros"}
    return write_image(disk, path, fill, attributes)


def _add(file: h5py.File, entry: dict[str, Any], shards: dict[str, Any]) -> None:
    dtype = dtype_from_json(entry["dtype"])
    kind, shape = hdf5_type(dtype, tuple(entry["shape"]))
    if len(shape) < len(entry["shape"]):
        return  # more axes than HDF5 has
    layout = h5py.VirtualLayout(shape, kind)
    axis = entry["cut"]
    for start, stop, *piece in entry["pieces"]:
        if piece:
            name, index = piece
            part = piece_shape(tuple(entry["shape"]), axis, (start, stop))
            source = h5py.VirtualSource(
                name, shards[name]["ranges"][index]["dataset"], hdf5_type(dtype, part)[1], kind
            )
            place = [slice(0, extent) for extent in shape]
            place[axis] = slice(start, stop)
            layout[tuple(place)] = source
    file.create_virtual_dataset(entry["name"], layout, fillvalue=np.zeros((), kind)[()])

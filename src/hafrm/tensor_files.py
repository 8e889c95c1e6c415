"""safetensors files, written tensor by tensor and read row by row: no file is ever in memory as a whole.

A tensor may lie in one file, or its rows in several: then each file's metadata says where its rows start.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import _TYPES
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

ROWS = "first_rows"
MOST_BYTES = 50 * 10**9  # maximum size of a model file, as in transformers
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class Part(NamedTuple):
    """Rows of a tensor, or all of it."""

    rows: Tensor
    first: int  # index of the first row
    shape: torch.Size  # of the whole tensor


def own_part(tensor: Tensor) -> Part:
    """The rows that this rank holds of a sharded tensor; the whole of any other tensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Part(tensor, 0, tensor.shape)
    where = tensor.shape, tensor.device_mesh, tensor.placements
    _, offsets = compute_local_shape_and_global_offset(*where)
    return Part(tensor.to_local(), offsets[0], tensor.shape)


def write_tensors(
    file: Path, parts: Mapping[str, Part], values: Iterator[Tensor] | None = None
) -> None:
    """Write the parts, copying one at a time to the host, and sync the file. Rows on the meta device are
    taken from `values`."""
    first = {name: part.first for name, part in parts.items() if part.rows.shape != part.shape}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if first:
        header["__metadata__"][ROWS] = json.dumps(first)
    end = 0
    for name, part in parts.items():
        start, end = end, end + part.rows.numel() * part.rows.element_size()
        place = {"dtype": _NAMES[part.rows.dtype], "shape": list(part.rows.shape)}
        header[name] = {**place, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data is aligned to 8 bytes
    with file.open("xb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name, part in parts.items():
            rows = part.rows if values is None else next(values)
            assert (rows.shape, rows.dtype) == (part.rows.shape, part.rows.dtype), name
            # a copy: a storage that numpy has seen cannot be freed by resizing
            flat = rows.contiguous().to("cpu", copy=True).reshape(-1)
            output.write(flat.view(torch.uint8).numpy().data)
        output.flush()
        os.fsync(output.fileno())


def write_files(folder: Path, tensors: dict[str, Tensor], values: Iterator[Tensor]) -> None:
    """Write a model's tensors (on the meta device) to model.safetensors, or several files and an index."""
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=MOST_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        parts = {name: Part(tensors[name], 0, tensors[name].shape) for name in names}
        write_tensors(folder / file, parts, values)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)


class TensorFiles:
    """The tensors of some safetensors files; any of their rows can be read."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._places: dict[str, list[tuple[int, Any]]] = {}
        for file in files:
            content: Any = safe_open(file, "pt")
            first = json.loads((content.metadata() or {}).get(ROWS, "{}"))
            for name in content.keys():  # noqa: SIM118 - no mapping
                self._places.setdefault(name, []).append((first.get(name, 0), content))

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> list[int]:
        """The shape of a whole tensor."""
        first, last = max(self._places[name], key=lambda place: place[0])
        length: list[int] = last.get_slice(name).get_shape()
        return [first + length[0], *length[1:]] if length else []

    def read(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """Rows [first, end) of a tensor; by default all of it."""
        rows: list[Tensor] = []
        for start, content in sorted(self._places[name], key=lambda place: place[0]):
            part = content.get_slice(name)
            if not part.get_shape():
                whole: Tensor = content.get_tensor(name)
                return whole
            stop = start + part.get_shape()[0]
            low, high = max(first, start), stop if end is None else min(end, stop)
            if low < high or not rows:
                rows.append(part[low - start : max(low, high) - start])
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def fill(self, target: Tensor, name: str) -> None:
        """Copy a stored tensor into `target`; if that is sharded, the rows of this rank."""
        part = own_part(target)
        if part.rows.numel():
            end = part.first + len(part.rows) if part.shape else None
            part.rows.copy_(self.read(name, part.first, end))

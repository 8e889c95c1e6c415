"""Data sets of the Hugging Face hub -> numbered raw rows; `datasets` is imported only to read one.

A data set is named "hub:name[@revision][:config]:split", or described by a `HubSet` where more must be
said. Nothing here knows what a row means.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hafrm.data.files import Numbered
from hafrm.errors import DataError

_NAME = re.compile(
    r"hub:(?P<name>[^:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:\[\]]+))?"
    r":(?P<split>[^:\[\]]+(?:\[[^\[\]]*\])?)"
)


@dataclass(frozen=True, slots=True)
class HubSet:
    """One split of a data set on the hub."""

    name: str
    split: str = "train"
    config: str | None = None
    folder: str | None = None
    """The folder of the repository that holds it, where it has several without naming them."""
    file: str | None = None
    """The file in the repository, where only a loading script (which nobody runs any more) names it."""
    revision: str | None = None

    def __str__(self) -> str:
        """As it is written in a recipe, as far as that can say it."""
        within = [part for part in (self.config or self.folder, self.split) if part]
        revision = f"@{self.revision}" if self.revision else ""
        return ":".join([f"hub:{self.name}{revision}", *within])


def parse_hub(location: str) -> HubSet:
    """The data set that "hub:name[@revision][:config]:split" names; raises `DataError` otherwise."""
    found = _NAME.fullmatch(location)
    if found is None:
        raise DataError(f"{location!r} is not of the form hub:name[@revision][:config]:split")
    return HubSet(found["name"], found["split"], found["config"], revision=found["revision"])


def read_hub(hub: HubSet) -> Numbered:
    """(row number, row) of every row, in order; raises `DataError` when it cannot be loaded."""
    import datasets  # noqa: PLC0415  (1.4 s)

    try:
        table = _load(datasets.load_dataset, hub)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{hub} cannot be loaded: {error}") from error
    yield from enumerate(table)


def _load(load_dataset: Any, hub: HubSet) -> Any:
    if hub.file is not None:
        revision = f"@{hub.revision}" if hub.revision else ""
        url = f"hf://datasets/{hub.name}{revision}/{hub.file}"
        return load_dataset(
            _BUILDERS[PurePosixPath(hub.file).suffix], data_files=url, split="train"
        )
    folder = {} if hub.folder is None else {"data_dir": hub.folder}
    return load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision, **folder)


_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

"""Where every number comes from: commands, commits, versions, seeds, digests of the data, the recipe."""

from collections.abc import Iterator

from hafrm.reporting.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Listing,
    More,
    Rows,
    Section,
    Table,
    words,
)
from hafrm.reporting.folders import Folder, Json, Material, dig, source_names
from hafrm.reporting.numbers import count


def section(material: Material) -> Section | None:
    """What is known of each folder; open where there is but one."""
    blocks: list[Block] = []
    for folder in material.folders:
        known = tuple(_of_folder(folder))
        if known:
            blocks.append(More(folder.name, known, is_open=len(material.folders) == 1))
    versions = _versions(material)
    if versions is not None:
        blocks.append(versions)
    if not blocks:
        return None
    lead = "Enough to make every number again."
    return Section("provenance", "Provenance", lead, tuple(blocks))


def _of_folder(folder: Folder) -> Iterator[Block]:
    facts = [("files", ", ".join(_files(folder)))]
    for session in folder.sessions:
        facts += list(_of_session(session))
    last = folder.sessions[-1] if folder.sessions else {}
    if last.get("template_sha256"):
        facts.append(("chat template, SHA-256", str(last["template_sha256"])))
    yield Facts(tuple((term, text) for term, text in facts if text))
    digests = last.get("data") or {}
    if digests:
        names = source_names([str(file) for file in digests])
        rows = tuple((words(names[str(f)]), Cell(str(d))) for f, d in digests.items())
        columns = (Column("data file", "word"), Column("SHA-256", "word"))
        yield Table("Digests of the data", columns, (Rows(rows),))
    counts = [(key.replace("_", " "), text) for key, text in _counts(last.get("counts") or {})]
    if counts:
        yield More("Rows and tokens", (Facts(tuple(counts)),))
    if folder.recipe_text:
        yield More("Recipe", (Listing(folder.recipe_text),))


def _files(folder: Folder) -> list[str]:
    names = ("recipe.yaml", "provenance.json", "metrics.jsonl", "samples.jsonl")
    here = [name for name in names if (folder.path / name).is_file()]
    return here + [f"{name}.json" for name in folder.results]


def _of_session(session: Json) -> Iterator[tuple[str, str]]:
    yield "started", str(session.get("started") or "")
    yield "command", str(session.get("command") or "")
    commit = dig(session, "git", "commit")
    if commit:
        changed = dig(session, "git", "changed")
        yield "commit", str(commit) + (", with changes that are in no commit" if changed else "")
    yield "platform", str(session.get("platform") or "")
    if session.get("seed") is not None:
        yield "seed", str(session["seed"])


def _counts(found: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _counts(value, f"{prefix}{key}: ")
        elif isinstance(value, int):
            yield f"{prefix}{key}", count(value)


def _versions(material: Material) -> Table | None:
    """A column for each set of versions that differs from the others."""
    found: dict[str, Json] = {}
    for folder in material.folders:
        for session in folder.sessions[-1:]:
            versions = session.get("versions") or {}
            same = next((name for name, other in found.items() if other == versions), None)
            name = folder.name if same is None else f"{same}, {folder.name}"
            if same is not None:
                del found[same]
            found[name] = versions
    packages = dict.fromkeys(package for versions in found.values() for package in versions)
    if not packages:
        return None
    rows = tuple(
        (words(package), *(Cell(str(versions.get(package, ""))) for versions in found.values()))
        for package in packages
    )
    columns = (Column("package", "word"), *(Column(name, "word") for name in found))
    return Table("Versions", columns, (Rows(rows),))

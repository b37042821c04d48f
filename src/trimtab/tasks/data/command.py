"""`trimtab data list | get NAME ... | check [NAME or FOLDER ...]`."""

import sys
from pathlib import Path

from trimtab.errors import DataError, RecipeError
from trimtab.tasks.data.data_set import DataFile, DataSet
from trimtab.tasks.data.fetch import OnProgress, fetch
from trimtab.tasks.data.folder import FOLDER_VARIABLE, IMAGENET, checked, data_folder, find_file, image_folder
from trimtab.tasks.data.table import DATA_SETS, find_data_set
from trimtab.words import nearest

_USAGE = f"""usage: trimtab data list | get NAME ... | check [NAME or FOLDER ...]

  list    the data sets by name, with their licences, and which of them are here
  get     fetch data sets from where their owners publish them, into the data
          folder; interrupted, the same command goes on where it was
  check   hold every file of the named sets, or of all that are here, against its
          checksum, and decode every image of a folder with train/ and val/ in
          it; the exit code is 1 if a file is damaged, missing or unreadable

The data folder is {{folder}};
the environment variable {FOLDER_VARIABLE} names another."""


def data_command(words: list[str]) -> int:
    """Run `trimtab data`.

    Args:
        words: what comes after `data` on the command line.

    Returns:
        The exit code: 0, or 1 if `check` found a file damaged, missing or unreadable, or 130 after Ctrl-C.

    Raises:
        DataError: a data set is unknown or cannot be fetched, or a folder is none of images.
        RecipeError: there is no such command.
    """
    command, names = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help") or {"-h", "--help"} & set(names):
        print(_USAGE.format(folder=data_folder()))
        return 0
    if command == "list" and not names:
        return _list()
    if command == "check":
        return _check([_set_or_folder(name) for name in names])
    if command == "get" and names:
        return _get([find_data_set(name) for name in names])
    if command in ("list", "get"):
        raise RecipeError(
            "trimtab data list takes no names" if command == "list" else "get which? trimtab data get NAME ..."
        )
    hint = nearest(command, ("list", "get", "check"))
    raise RecipeError(f"unknown command {command!r}.{hint} {_USAGE.partition(chr(10))[0].removeprefix('usage: ')}")


def _set_or_folder(name: str) -> DataSet | Path:
    return DATA_SETS.get(name) or image_folder(name) or find_data_set(name)


def _list() -> int:
    rows = [("NAME", "TASK", "SIZE", "LICENCE", "", "CONTENTS")]
    rows += [("digits", "images", "58 kB", "CC BY 4.0", "in the package", "1,437 + 360 grey images of 8×8, 10 classes")]
    presence = "here" if (data_folder() / IMAGENET).is_dir() else "absent"
    rows.append((IMAGENET, "images", "", "image-net.org's terms", presence, "a folder of train/CLASS/ and val/CLASS/"))
    rows.append(("fake-imagenet", "images", "", "", "made up", "random images for dry runs, 1,000 classes"))
    for data in DATA_SETS.values():
        size = f"{data.size / 1e6:.1f} MB" if data.size >= 1e5 else f"{data.size / 1e3:.0f} kB"
        rows.append((data.name, data.task, size, data.licence, _presence(data), data.contents))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        cells[2] = row[2].rjust(widths[2])
        print("  ".join([*cells, row[5]]).rstrip())
    print(f"\ndata folder: {data_folder()}{'' if data_folder().is_dir() else ', which is not there yet'}")
    return 0


def _presence(data: DataSet) -> str:
    here = sum(find_file(file).exists() for file in data.files)
    if here == len(data.files):
        return "here"
    if here:
        return f"{here} of {len(data.files)} files here"
    return "absent; can be fetched" if data.can_be_fetched else "absent"


def _check(chosen: list[DataSet | Path]) -> int:
    """Check data sets and folders of images or, if none is chosen, the sets of which anything is here."""
    some = [data for data in DATA_SETS.values() if any(find_file(file).exists() for file in data.files)]
    bad = sum(_check_folder(each) if isinstance(each, Path) else _check_files(each) for each in chosen or some)
    if not chosen and (absent := [data.name for data in DATA_SETS.values() if _presence(data).startswith("absent")]):
        print(f"absent: {', '.join(absent)}")
    if bad:
        print(f"{bad:,} {'file is' if bad == 1 else 'files are'} damaged or missing", file=sys.stderr)
    return 1 if bad else 0


def _check_files(data: DataSet) -> int:
    """Hold each file of a set against its checksum; how many are not good."""
    bad = 0
    for file in data.files:
        verdict = _verdict(find_file(file), file)
        bad += verdict != "good"
        print(f"{file.path}: {verdict}", flush=True)
    return bad


def _check_folder(folder: Path) -> int:
    """Decode every image of a folder and name those that cannot be read; how many these are."""
    from trimtab.tasks.images.sets.decoding import needs_pillow
    from trimtab.tasks.images.sets.listing import list_images, shown
    from trimtab.tasks.images.sets.unreadable import decode_all

    needs_pillow("checking images")
    bad = 0
    for listing in list_images(folder):
        found = decode_all(listing)
        bad += len(found)
        for index, why in found.items():
            print(f"{shown(listing.path(index))}: {why}")
        count = f"{len(listing.labels):,} images in {len(listing.classes):,} classes"
        verdict = f"{len(found):,} cannot be read" if found else "good"
        passed = f"; {len(listing.strays):,} other files passed over" if listing.strays else ""
        print(f"{shown(listing.folder)}: {count}: {verdict}{passed}", flush=True)
    return bad


def _verdict(path: Path, file: DataFile) -> str:
    try:
        checked(path, file)
    except FileNotFoundError:
        return f"missing in {path.parent}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except DataError as error:
        return str(error)
    return "good"


def _get(chosen: list[DataSet]) -> int:
    for data in chosen:
        if not data.can_be_fetched:
            files = ", ".join(file.path for file in data.files)
            raise DataError(
                f"nobody publishes the files of {data.name} at an address of their own (they come from {data.source}); "
                f"copy {files} into {data_folder()}"
            )
    folder = data_folder()
    for data in chosen:
        print(f"{data.name}: {data.contents}. From {data.source}; licence: {data.licence}")
        for file in data.files:
            try:
                fetch(file, folder, _show(file))
            except KeyboardInterrupt:
                print(
                    f"stopped; what came is kept, and `trimtab data get {data.name}` goes on from there",
                    file=sys.stderr,
                )
                return 130
            finally:
                _end_line()
            print(f"  {file.path}: good")
    print(f"in {folder}")
    return 0


def _show(file: DataFile) -> OnProgress:
    """Tell on a terminal, in one line, how far the file is."""

    def show(here: int) -> None:
        if sys.stderr.isatty():
            text = f"\r  {file.path}: {here / 1e6:.1f} of {file.size / 1e6:.1f} MB ({here / file.size:.0%})\x1b[K"
            print(text, end="", file=sys.stderr, flush=True)

    return show


def _end_line() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

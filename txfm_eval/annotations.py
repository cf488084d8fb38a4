"""Lists of related genes: where the annotation files are and how they are read.

A file has the header ``entity1,entity2`` and a pair of gene symbols a line, one file a database. The public
ones (CORUM, HuMAP, Reactome, SIGNOR, StringDB) come with the package efaar_benchmarking and are not part of
this project.
"""

import csv
import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = ("entity1", "entity2")
_PACKAGE = "efaar_benchmarking"
_FOLDER = "benchmark_annotations"
REMEDY = (
    "Give files with the header 'entity1,entity2' through --annotations, or take the public ones from the "
    f"package {_PACKAGE} "
    f"(pip install --no-deps {_PACKAGE}; it is found when installed). Licences of the public files: CORUM "
    "and SIGNOR are "
    "CC-BY-NC (no commercial use), HuMAP and StringDB CC-BY 4.0, Reactome CC0"
)


@dataclass(frozen=True)
class Annotation:
    """One database of related genes.

    name : stem of the file.  pairs : (symbol, symbol) with the first before the second in the alphabet; each
    pair once, no gene with itself.  n_rows : rows of the file.  sha256 : of the file, hex.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    n_rows: int
    sha256: str


def find_annotations(paths: Sequence[str | Path] = ()) -> list[Path]:
    """Annotation files, sorted by name.

    paths : files, and folders whose ``*.txt`` files are taken; without any, those of the installed package
    efaar_benchmarking, which is looked up but never imported.

    Raises
    ------
    FileNotFoundError
        If a path does not exist, a folder holds no ``*.txt``, or no path is given and the package is not
        installed.
    ValueError
        If two files have the same name, since the name is what results are reported under.
    """
    files: list[Path] = []
    for path in [Path(p) for p in paths] or [_package_folder()]:
        if path.is_dir():
            inside = sorted(path.glob("*.txt"))
            if not inside:
                raise FileNotFoundError(f"{path}: no annotation file (*.txt) in this folder. {REMEDY}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such annotation file or folder. {REMEDY}")
    names = [path.stem for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"annotations: {twice} are given more than once; each database needs its own file name")
    return sorted(files, key=lambda path: path.stem)


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place) / _FOLDER
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no annotation files: none given, and {_PACKAGE} is not installed. {REMEDY}")


def read_annotation(path: str | Path) -> Annotation:
    """Read one annotation file: unordered pairs, each once, without pairs of a gene with itself.

    Raises
    ------
    ValueError
        If the header is not ``entity1,entity2``, a row has not two symbols, or there is no pair.
    """
    path = Path(path)
    raw = path.read_bytes()
    try:
        rows = csv.reader(raw.decode("utf-8-sig").splitlines())
        header = next(rows, [])
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason}); expected lines 'entity1,entity2'") from error
    if tuple(name.strip() for name in header) != HEADER:
        raise ValueError(f"{path}: the first line is {','.join(header)[:60]!r}, expected 'entity1,entity2'")
    pairs: set[tuple[str, str]] = set()
    n_rows = 0
    for row in rows:
        if not row:
            continue
        n_rows += 1
        entities = [entity.strip() for entity in row]
        if len(entities) != 2 or not all(entities):
            raise ValueError(f"{path}: line {rows.line_num}: {','.join(row)[:60]!r}, expected two gene symbols")
        if entities[0] != entities[1]:
            pairs.add((min(entities), max(entities)))
    if not pairs:
        raise ValueError(f"{path}: holds no pair of different genes")
    return Annotation(path.stem, tuple(sorted(pairs)), n_rows, hashlib.sha256(raw).hexdigest())

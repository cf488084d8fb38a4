"""Tables of a corpus that somebody made or damaged, their sha256 and the manifest made to fit: each is refused by name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import manifest as mf
from shards.manifest import Corpus
from tests.shards.corpus_maker import Plan, make_corpus, reseal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus", Plan(weights=(1.0, 0.5)))


def test_a_vocabulary_that_is_none(folder: Path) -> None:
    path = folder / mf.VOCABULARY
    good = pq.read_table(path)
    long_name = pa.array(["x" * 2_000] * 400)
    cases = (
        (b"PAR1" + bytes(100) + b"PAR1", "no vocabulary"), (good.slice(1), "399 genes"),
        (good.drop_columns(["symbol"]), "symbol"),
        (good.set_column(2, "n_measured", pa.array(["1"] * 400)), "its columns"),
        (good.set_column(0, "gene_id", pa.array(["same"] * 400)), "more than once"),
        (good.set_column(0, "gene_id", pa.array([f"x{i}" for i in range(400)])), "belongs to another corpus"),
        (good.set_column(1, "symbol", pa.array([None] * 400, pa.string())), "missing values"),
        (good.set_column(1, "symbol", long_name), "more than 1000 letters"),
        (good.set_column(3, "n_nonzero", pa.array([-1] * 400)), "counts of samples"),
        (good.set_column(2, "n_measured", pa.array([85] * 400)), "counts of samples"),
        (good.set_column(4, "mean_log1p", pa.array([float("nan")] * 400)), "mean_log1p"),
    )  # fmt: skip
    for table, message in cases:
        path.write_bytes(table) if isinstance(table, bytes) else pq.write_table(table, path)
        reseal(folder)
        with pytest.raises(ValueError, match=rf"vocabulary\.parquet: .*{message}"):
            Corpus(folder)


def write_arrow(path: Path, table: pa.Table, compression: str | None = None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)


def panels_table(genes: list[list[int]], means: list[list[float]], first: int = 0) -> pa.Table:
    return pa.table(
        {
            "panel_id": pa.array(range(first, first + len(genes)), pa.int32()),
            "gene_ids": pa.array(genes, pa.large_list(pa.uint16())),
            "mean_normalized": pa.array(means, pa.large_list(pa.float32())),
        }
    )


def test_panels_that_are_none(folder: Path) -> None:
    path = folder / mf.PANELS
    one = [[0, 1]], [[1.0, 1.0]]
    cases = (
        (panels_table(*one), "has panel 1 of 1"), (panels_table([[0], [2, 1]], [[1.0], [1.0, 1.0]]), "not an ascending subset"),
        (panels_table([[0], [400]], [[1.0], [1.0]]), "not an ascending subset"),
        (panels_table(*one, first=3), "numbered from 0"),
        (panels_table([[0], [1]], [[1.0], [1.0, 2.0]]), "fewer than genes"),
        (panels_table([[0], [1]], [[1.0], [-1.0]]), "negative"),
        (panels_table([[0], [1]], [[1.0], [float("inf")]]), "no numbers"),
        (panels_table([[0], [None]], [[1.0], [1.0]]), "missing or unused"),
        (panels_table([[0], None], [[1.0], [1.0]]), "missing values"),
        (pa.table({"panel_id": pa.array([0, 1])}), "its columns"),
    )  # fmt: skip
    for table, message in cases:
        write_arrow(path, table)
        reseal(folder)
        with pytest.raises(
            ValueError, match=rf"{mf.MANIFEST if 'has panel' in message else 'panels.arrow'}: .*{message}"
        ):
            Corpus(folder)
    for data in (b"ARROW1\0\0" + bytes(64), b"x" * 10, path.read_bytes()[:-30]):
        path.write_bytes(data)
        reseal(folder)
        with pytest.raises(ValueError, match=r"panels\.arrow: no panels of this corpus"):
            Corpus(folder)


def test_a_compressed_table_is_refused_before_it_grows(folder: Path) -> None:
    genes = list(range(400)) * 2_500  # a million; so many are no panel, but it must not come to that
    write_arrow(folder / mf.PANELS, panels_table([genes, [0]], [[0.0] * len(genes), [1.0]]), "zstd")
    reseal(folder)
    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises(ValueError, match=r"panels\.arrow: .*it is compressed"):
        Corpus(folder)
    assert pa.default_memory_pool().bytes_allocated() <= before + 100_000


def test_a_table_of_train_samples_that_is_none(folder: Path) -> None:
    path = folder / mf.TRAIN_SAMPLES
    good = pa.ipc.open_file(path).read_all()
    dataset = good["dataset"].to_pylist()
    cases = (
        (good.slice(1), "83 samples, the manifest says 84"), (good.select(["dataset"]), "its columns"),
        (good.set_column(0, "sample_id", pa.array([-1] * 84)), "negative id"),
        (good.set_column(1, "dataset", pa.array([*dataset[1:], 2], pa.int32())), "does not exist"),
        (good.set_column(1, "dataset", pa.array([*dataset[1:], None], pa.int32())), "missing values"),
    )  # fmt: skip
    for table, message in cases:
        write_arrow(path, table)
        reseal(folder)
        with pytest.raises(ValueError, match=rf"train-samples\.arrow: .*{message}"):
            Corpus(folder).train_samples()

"""The Census as a source, offline: against the arrays it was made from and against cellxgene_census itself."""

import http.server
import importlib.util
import json
import logging
import pickle
import shutil
import sys
import threading
import time
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma

from txfm_data import kernels
from txfm_data.obs_filter import parse
from txfm_data.sources import census as census_source
from txfm_data.sources import census_plan, census_release
from txfm_data.sources.census import CensusSource, blocks, open_census
from txfm_data.sources.census_plan import plan, priorities
from txfm_data.sources.protocol import chunks

# Test folders are no packages: the builder is loaded by its path.
_SPEC = importlib.util.spec_from_file_location("census_fixture", Path(__file__).with_name("census_fixture.py"))
fixture = importlib.util.module_from_spec(_SPEC)
sys.modules["census_fixture"] = fixture
_SPEC.loader.exec_module(fixture)

LUNG, BLOOD, SMART = fixture.DATASETS
PROXIES = (
    "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "AWS_CA_BUNDLE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    if "loopback" in request.fixturenames:
        return

    def refuse(*args, **kwargs):
        raise OSError("the network is forbidden in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return fixture.build_census(tmp_path_factory.mktemp("census") / "census")


@pytest.fixture(scope="module")
def release(made):
    with open_census(uri=made.uri) as opened:
        yield opened


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made.uri, tmp_path / "census")
    return tmp_path / "census"


def rows_of(made, dataset, *, primary=True):
    chosen = made.obs["dataset_id"] == dataset
    return np.flatnonzero(chosen & made.obs["is_primary_data"] if primary else chosen)


def source_of(release, made, dataset, joinids=None, **options):
    joinids = rows_of(made, dataset, primary=False) if joinids is None else np.asarray(joinids)
    return CensusSource(release, "homo_sapiens", dataset, joinids, **options)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_copy_says_what_it_is(release, made):
    assert (release.build_date, release.schema_version) == (fixture.BUILD, fixture.SCHEMA)
    assert release.organisms == ("homo_sapiens",) and release.uri == made.uri
    assert release.organism("Homo sapiens") == "homo_sapiens"
    assert int(release.census.context.tiledb_config["soma.init_buffer_bytes"]) == 32 * 1024**2


def test_an_address_wins_over_a_version_and_may_be_a_file_url(made):
    with open_census("stable", f"file://{made.uri}") as opened:
        assert opened.build_date == fixture.BUILD


def test_relative_addresses_are_resolved(made, monkeypatch):
    monkeypatch.chdir(Path(made.uri).parent)
    with open_census(uri="census") as opened:
        assert opened.uri == made.uri


def test_settings_pass_through(made):
    given = {"vfs.s3.region": "eu-west-1", "vfs.s3.no_sign_request": "false", "vfs.s3.proxy_host": "p"}
    with open_census(uri=made.uri, tiledb_config=given) as opened:
        config = opened.census.context.tiledb_config
        assert {key: config[key] for key in given} == given
        assert "eu-west-1" not in repr(opened)


@pytest.mark.parametrize(
    ("part", "error", "told"),
    [
        (
            "absent",
            FileNotFoundError,
            "cannot open .*absent: not there: .*name a folder or address that holds census_info",
        ),
        (
            "census_data",
            ValueError,
            r"not shaped like the Census: has no \['census_info', 'census_data'\], it holds \['homo",
        ),
        ("census_data/homo_sapiens", ValueError, "cannot open .*name a folder or address"),
        ("census_info/summary", FileNotFoundError, "cannot open .*name a folder or address"),
    ],
)
def test_addresses_without_a_census_are_refused(made, part, error, told):
    with pytest.raises(error, match=told):
        open_census(uri=f"{made.uri}/{part}")


def test_a_collection_without_its_parts_is_refused(copy, tmp_path):
    with tiledbsoma.Collection.create(str(tmp_path / "bare")) as top:
        top.add_new_collection("census_data")
        fixture.add_frame(
            top.add_new_collection("census_info"), "summary", pd.DataFrame({"soma_joinid": [0], "label": ["a"]})
        )
    with pytest.raises(ValueError, match=r"has no \['census_info/datasets'\]"):
        open_census(uri=str(tmp_path / "bare"))
    with tiledbsoma.open(str(copy / "census_info" / "summary"), "w") as writer:
        label = pa.array(["something else"], pa.large_string())
        writer.write(pa.table({"soma_joinid": [1], "label": label, "value": label}))
    with pytest.raises(ValueError, match=r"summary has no \['census_build_date'\], it has \["):
        open_census(uri=str(copy))


def test_neither_version_nor_address():
    with pytest.raises(ValueError, match="--version .* or a copy of it with --uri"):
        open_census()


def test_without_a_network_a_version_is_refused_within_seconds(caplog):
    start = time.monotonic()
    with pytest.raises(
        OSError, match="--version stable: cannot read the list of Census releases: .*HTTPS_PROXY.*--uri"
    ):
        open_census("stable")
    assert time.monotonic() - start < 5
    assert "try 1 of 2 failed" in caplog.text


def test_a_network_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(census_release, "RESOLVE_S", 0.05)
    with pytest.raises(TimeoutError, match="no answer within"):
        census_release._within(0.05, lambda: time.sleep(2))
    with pytest.raises(KeyError, match="k"):
        census_release._within(5, lambda: {}["k"])


class _Directory(http.server.BaseHTTPRequestHandler):
    pages: dict[str, dict] = {}
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        body = json.dumps(self.pages[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def loopback(made, monkeypatch):
    """A list of releases served on this machine, whose only release is the collection of these tests."""
    entry = {
        "release_date": None, "release_build": fixture.BUILD, "flags": {"lts": True, "retracted": False},
        "soma": {"uri": "", "relative_uri": made.uri, "s3_region": None},
        "h5ads": {"uri": "", "relative_uri": "", "s3_region": None},
    }  # fmt: skip
    _Directory.pages = {
        "/release.json": {fixture.BUILD: entry, "latest": fixture.BUILD, "stable": fixture.BUILD},
        "/mirrors.json": {"default": "here", "here": {"provider": "file", "base_uri": "file:///", "region": None}},
    }
    _Directory.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Directory)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{server.server_port}"
    module = sys.modules["cellxgene_census._release_directory"]
    monkeypatch.setattr(module, "CELL_CENSUS_RELEASE_DIRECTORY_URL", f"{base}/release.json")
    monkeypatch.setattr(module, "CELL_CENSUS_MIRRORS_DIRECTORY_URL", f"{base}/mirrors.json")
    yield _Directory
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_alias_is_resolved_once_and_the_date_recorded(loopback, made):
    with open_census("latest") as opened:
        assert (opened.build_date, opened.uri.rstrip("/")) == (fixture.BUILD, f"file://{made.uri}")
        asked = list(loopback.asked)
        part = plan(opened).datasets[0]
        with plan(opened).source(part) as source, pickle.loads(pickle.dumps(source.opener()))() as again:
            assert (source.read(0, 5) != again.read(0, 5)).nnz == 0
    assert loopback.asked == asked, "reopening does not ask for the release again"


def test_an_unknown_version_lists_those_there_are(loopback):
    with pytest.raises(
        ValueError, match=f"--version '2026-11-03': there is no such release; near it: .*'{fixture.BUILD}'"
    ):
        open_census("2026-11-03")


# --- proxies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"HTTPS_PROXY": "http://p.example:3128"}, {"scheme": "http", "host": "p.example", "port": 3128}),
        ({"HTTPS_PROXY": "https://p.example"}, {"scheme": "https", "host": "p.example", "port": 443}),
        (
            {"HTTPS_PROXY": "http://me:ge%40heim@p.example:3128"},
            {"scheme": "http", "host": "p.example", "port": 3128, "username": "me", "password": "ge@heim"},
        ),
        ({"HTTPS_PROXY": "http://p.example:3128", "NO_PROXY": ".amazonaws.com"}, {}),
    ],
)
def test_the_proxy_of_the_environment_reaches_tiledb(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    named = {f"vfs.s3.proxy_{key}": value for key, value in expected.items()}
    for is_public in (True, False):
        assert census_release._environment({}, is_public=is_public) == named
        assert census_release._environment({"vfs.s3.proxy_host": "mine"}, is_public=is_public) == {}


def test_an_endpoint_of_the_environment_is_not_the_public_census(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.local:9000")
    assert census_release._environment({}, is_public=True) == {}
    assert census_release._environment({}, is_public=False)["vfs.s3.endpoint_override"] == "minio.local:9000"


@pytest.mark.parametrize("address", ["http://me:geheim@p.example:port", "http://me:geheim@:80"])
def test_a_bad_proxy_is_refused_without_showing_it(monkeypatch, address):
    monkeypatch.setenv("HTTPS_PROXY", address)
    with pytest.raises(ValueError, match="HTTPS_PROXY is .* expected the address of a service") as error:
        open_census(uri="s3://bucket/census")
    assert "geheim" not in str(error.value)


def test_proxy_passwords_are_not_shown(monkeypatch, caplog):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:geheim@127.0.0.1:9")
    with caplog.at_level(logging.DEBUG), pytest.raises(OSError, match="cannot open s3://bucket/census") as error:
        open_census(uri="s3://bucket/census", tiledb_config={"vfs.s3.connect_max_tries": "1"})
    assert "geheim" not in str(error.value) + repr(error.value.__cause__) + caplog.text


# --- planning --------------------------------------------------------------------------------------------------------


def test_everything_primary_is_taken_by_default(release, made):
    chosen = plan(release)
    assert [part.dataset_id for part in chosen.datasets] == list(fixture.DATASETS)
    for part, panel in zip(chosen.datasets, fixture.PANELS, strict=True):
        np.testing.assert_array_equal(part.joinids, rows_of(made, part.dataset_id))
        assert part.joinids.dtype == np.int64
        assert (part.n_panel, part.title) == (len(panel), f"Title of {part.dataset_id}")
        assert part.nnz == (made.counts[part.joinids] > 0).sum()
    told = chosen.describe()
    assert json.loads(json.dumps(told)) == told
    primary = made.obs["is_primary_data"].to_numpy()
    assert told["n_obs"] == chosen.n_obs == primary.sum() == sum(d["n_obs"] for d in told["datasets"])
    assert told["nnz"] == (made.counts[primary] > 0).sum() and told["n_genes"] == 80 and told["n_datasets"] == 3
    assert told["bytes_of_store"] == 2 * told["nnz"] < told["bytes_to_read"]
    assert told["bytes_of_memory"] > 8 * told["n_obs"] and told["obs_filter"] == "is_primary_data == True"
    assert (told["build_date"], told["uri"]) == (fixture.BUILD, made.uri)


@pytest.mark.parametrize(
    ("options", "query"),
    [
        ({"include_non_primary": True}, "soma_joinid >= 0"),
        ({"obs_filter": "is_primary_data == False"}, "not P"),
        ({"obs_filter": "tissue_general == 'lung' and sex != 'male'"}, "tissue_general == 'lung' and sex != 'male' and P"),
        ({"dataset_ids": [SMART, LUNG, SMART]}, "dataset_id != 'bbbb-blood' and P"),
        ({"obs_filter": "nnz < 9 or cell_type in ['B cell']"}, "(nnz < 9 or cell_type == 'B cell') and P"),
        ({"obs_filter": "disease == 'asthma'"}, "disease.str.contains('asthma') and P"),
        ({"obs_filter": "disease != 'influenza'"}, "not disease.str.contains('influenza') and P"),
        ({"obs_filter": "disease in ['lung cancer', 'normal']"}, "disease in ['normal', 'influenza || lung cancer'] and P"),
        ({"obs_filter": "disease == 'asthma || influenza'"}, "disease == 'asthma || influenza' and P"),
    ],
)  # fmt: skip
def test_selections(release, made, options, query):
    chosen = plan(release, **options)
    expected = made.obs.assign(P=made.obs["is_primary_data"]).query(query)["soma_joinid"].to_numpy()
    np.testing.assert_array_equal(np.concatenate([part.joinids for part in chosen.datasets]), expected)


def test_values_that_join_terms_are_reported(release):
    assert plan(release, obs_filter="disease == 'asthma'").describe()["added_values"] == ["asthma || influenza"]
    assert plan(release, obs_filter="sex == 'male'").describe()["added_values"] == []


def test_a_gene_filter_narrows_the_panels(release, made):
    chosen = plan(release, var_filter="feature_type == 'protein_coding'")
    coding = (made.var["feature_type"] == "protein_coding").to_numpy()
    assert [part.n_panel for part in chosen.datasets] == (made.presence & coding).sum(axis=1).tolist()
    assert chosen.describe()["n_genes"] == coding.sum()
    part = chosen.datasets[1]
    with chosen.source(part) as source:
        expected = made.counts[part.joinids][:, made.presence[1] & coding]
        np.testing.assert_array_equal(source.read(0, source.n_obs).toarray(), expected)
        assert source.n_measured == 60 and len(source.gene_ids) == expected.shape[1]
        np.testing.assert_array_equal(source.obs(0, 4)["raw_sum"], made.counts[part.joinids[:4]].sum(axis=1))


def test_a_draw_of_samples_depends_on_the_seed_alone(release, made, monkeypatch):
    def drawn(**options):
        return np.concatenate([part.joinids for part in plan(release, **options).datasets])

    few = drawn(max_samples=17, seed=4)
    primary = np.flatnonzero(made.obs["is_primary_data"])
    rank = [int(kernels.stream_key(4, 0, int(i))) for i in primary]
    np.testing.assert_array_equal(few, np.sort(primary[np.argsort(rank)[:17]]))
    np.testing.assert_array_equal(priorities(4, primary), np.array(rank, np.uint64))
    assert set(few) <= set(drawn(max_samples=40, seed=4)) and set(few) != set(drawn(max_samples=17, seed=5))
    np.testing.assert_array_equal(drawn(max_samples=10_000), primary)
    whole = plan(release, max_samples=17, seed=4)
    monkeypatch.setattr(census_plan, "PLAN_ROWS", 5)
    monkeypatch.setattr(census_plan, "PANELS_A_READ", 2)
    pieces = plan(release, max_samples=17, seed=4)
    assert pieces.describe() == whole.describe()
    assert whole.nnz == (made.counts[few] > 0).sum()
    np.testing.assert_array_equal(drawn(max_samples=17, seed=4), few)


def test_a_draw_holds_little_more_than_it_takes(monkeypatch):
    monkeypatch.setattr(census_plan, "PLAN_ROWS", 100)
    chosen, held = census_plan._Chosen(50, 1), []
    for start in range(0, 20_000, 100):
        ids = np.arange(start, start + 100)
        chosen.add(f"d{start % 300}", ids, np.ones(100, np.int64))
        held.append(sum(len(part) for parts in chosen._parts.values() for part, _ in parts))
    assert max(held) <= 300
    found = chosen.finish()
    expected = np.sort(np.argsort(priorities(1, np.arange(20_000)))[:50])
    np.testing.assert_array_equal(np.sort(np.concatenate([ids for ids, _ in found.values()])), expected)
    assert sum(n for _, n in found.values()) == 50


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"obs_filter": "celltype == 'T cell'"}, r"--obs-filter: there is no column 'celltype'; near it: \['cell_type'\]"),
        ({"obs_filter": "cell_type == 'T cel'"}, r"cell_type has no value 'T cel' \(near it: \['T cell', 'B cell'"),
        ({"obs_filter": "cell_type = 'T cell'"}, "character 11 .*write '=='"),
        ({"obs_filter": "disease == 'astma'"}, r"near it: \['asthma'\]"),
        ({"obs_filter": "dataset_id == 'aaaa-lunk'"}, r"dataset_id has no value 'aaaa-lunk' \(near it: \['aaaa-lung'\]"),
        ({"obs_filter": "cell_type in []"}, "the list is empty"),
        ({"obs_filter": "raw_sum == 'many'"}, "raw_sum is compared with 'many'"),
        ({"var_filter": "feature_nam == 'X'"}, r"--var-filter: there is no column 'feature_nam'; near it: \['feature_name'"),
        ({"var_filter": "feature_name in ['GENE1', 'GENE999']"}, r"--var-filter: feature_name has no value 'GENE999' \(near"),
        ({"var_filter": "nnz > 1000000"}, "dataset aaaa-lung measured no gene that passes --var-filter"),
        ({"obs_filter": "raw_sum > 1000000000"}, "no sample of homo_sapiens passes: .*raw_sum.*--include-non-primary"),
        ({"organism": "homo_sapien"}, r"--organism 'homo_sapien' is not there \(near it: \['homo_sapiens'\]\)"),
        ({"organism": "mouse"}, r"--organism 'mouse' is not there; it holds \['homo_sapiens'\]"),
        ({"dataset_ids": ["aaaa-lun", LUNG]}, r"names 1 that the release .* \(it has 3\): 'aaaa-lun' \(near it: \['aaaa"),
        ({"dataset_ids": []}, "--dataset-ids: names no dataset"),
        ({"max_samples": 0}, "--max-samples 0: at least one sample"),
    ],
)  # fmt: skip
def test_bad_selections_are_refused(release, options, told):
    with pytest.raises(ValueError, match=told):
        plan(release, **options)


def test_named_datasets_without_samples_are_reported(release, caplog):
    chosen = plan(release, dataset_ids=[LUNG, BLOOD], obs_filter="tissue_general == 'blood'")
    assert chosen.describe()["datasets_without_samples"] == [LUNG]
    assert [part.dataset_id for part in chosen.datasets] == [BLOOD]
    assert "1 of the datasets asked for have no sample" in caplog.text


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_cellxgene_census_reads(release, made):
    with cellxgene_census.open_soma(uri=made.uri) as census:
        whole = cellxgene_census.get_anndata(
            census, "Homo sapiens", obs_value_filter="is_primary_data == True",
        )  # fmt: skip
        presence = cellxgene_census.get_presence_matrix(census, "Homo sapiens").toarray().astype(bool)
    np.testing.assert_array_equal(presence, made.presence)
    chosen = plan(release)
    for number, part in enumerate(chosen.datasets):
        theirs = whole[(whole.obs["dataset_id"] == part.dataset_id).to_numpy()]
        with chosen.source(part) as source:
            ours = source.read(0, source.n_obs)
            assert ours.dtype == np.float32 and ours.has_canonical_format and (ours.data != 0).all()
            np.testing.assert_array_equal(ours.toarray(), theirs.X.toarray()[:, presence[number]])
            assert theirs.X.toarray()[:, ~presence[number]].sum() == 0
            assert source.gene_ids == tuple(whole.var["feature_id"][presence[number]])
            assert source.symbols == tuple(whole.var["feature_name"][presence[number]])
            obs = source.obs(0, source.n_obs)
            assert obs.index.tolist() == theirs.obs["observation_joinid"].tolist()
            for column in source.obs_columns:
                assert obs[column].tolist() == theirs.obs[column].tolist(), column
            np.testing.assert_array_equal(np.asarray(ours.sum(axis=1)).ravel(), obs[source.library_size_column])
            assert source.obs_columns == tuple(c for c in made.obs.columns if c != "soma_joinid")


def test_rows_come_in_any_pieces(release, made, monkeypatch):
    source = source_of(release, made, LUNG)
    whole = made.counts[:50, :60]
    cuts = source.cuts(2_000)
    assert len(cuts) > 10 and cuts[0][0] == 0 and cuts[-1][1] == 50
    assert [stop for _, stop in cuts[:-1]] == [start for start, _ in cuts[1:]]
    for start, rows in chunks(source, 2_000):
        np.testing.assert_array_equal(rows.toarray(), whole[start : start + rows.shape[0]])
    assert source.read(3, 3).shape == (0, 60) and source.read(3, 3).dtype == np.float32
    assert len(source.obs(3, 3)) == 0
    assert source.read(fixture.EMPTY, fixture.EMPTY + 1).nnz == 0
    assert source.symbols.count("TWIN") == 2 and len(set(source.gene_ids)) == 60
    monkeypatch.setattr(census_source, "ROWS_A_READ", 7)
    monkeypatch.setattr(census_source, "OBS_ROWS_A_READ", 6)
    np.testing.assert_array_equal(source.read(2, 49).toarray(), whole[2:49])
    assert source.obs(2, 49).index.tolist() == made.obs["observation_joinid"][2:49].tolist()


@pytest.mark.parametrize("dense", [1, 3, 64])
def test_scattered_samples_by_slice_or_by_list(release, made, dense, monkeypatch):
    joinids = np.array([0, 1, 2, 9, 11, 30, 31, 32, 33, 49])
    monkeypatch.setattr(census_source, "DENSE", dense)
    monkeypatch.setattr(census_source, "ROWS_A_READ", 4)
    with source_of(release, made, LUNG, joinids) as source:
        np.testing.assert_array_equal(source.read(0, 10).toarray(), made.counts[joinids, :60])
        np.testing.assert_array_equal(source.read(1, 6).toarray(), made.counts[joinids[1:6], :60])
        assert source.obs(1, 9).index.tolist() == made.obs["observation_joinid"][joinids[1:9]].tolist()


def test_blocks_are_few_and_cover_the_samples():
    joinids = np.concatenate([np.arange(5_000), np.arange(10**6, 10**9, 10**6)])
    parts = list(blocks(joinids, 2_048, 4))
    assert [(start, stop) for start, stop, _ in parts] == [(0, 2_048), (2_048, 4_096), (4_096, 5_999)]
    assert parts[0][2] == slice(0, 2_047) and parts[1][2] == slice(2_048, 4_095)
    assert parts[2][2].to_pylist() == joinids[4_096:].tolist()


def test_hashes_tell_selections_apart(release, made):
    def digest(**options):
        return source_of(
            release, made, options.pop("dataset", LUNG), options.pop("rows", None), **options
        ).content_sha256()

    assert digest() == digest() and len(digest()) == 64
    others = [digest(rows=[0, 1]), digest(rows=[0, 2]), digest(dataset=BLOOD)]
    others.append(digest(var_filter=parse("feature_type == 'lncRNA'")))
    assert len({digest(), *others}) == 5


def test_another_process_opens_the_same(release, made):
    chosen = parse("feature_name != 'GENE3' and not feature_name in ['it\\'s']")
    with source_of(release, made, SMART, var_filter=chosen) as source:
        opener = pickle.dumps(source.opener())
        with pickle.loads(opener)() as again:
            assert again.content_sha256() == source.content_sha256() and again.gene_ids == source.gene_ids
            assert (again.read(0, 40) != source.read(0, 40)).nnz == 0
            assert "GENE12" in again.symbols and again.where == source.where
        assert source.read(0, 1).nnz, "the first is still open"
    assert "Ensembl ids" in source.gene_hint()


def test_a_copy_that_was_replaced_is_refused(made, copy):
    with open_census(uri=str(copy)) as opened:
        opener = source_of(opened, made, LUNG).opener()
    with tiledbsoma.open(str(copy / "census_info" / "summary"), "w") as writer:
        row = {"soma_joinid": [1], "label": ["census_build_date"], "value": ["2027-01-01"]}
        writer.write(
            pa.table(
                row, pa.schema([("soma_joinid", pa.int64()), *[(c, pa.large_string()) for c in ("label", "value")]])
            )
        )
    with pytest.raises(ValueError, match="is the build of 2027-01-01 now, it was 2026-11-02"):
        opener()


class Faulty:
    """An array whose reads first fail as they are told to; everything else is the real one's."""

    def __init__(self, array, *faults):
        self._array, self.faults, self.reads = array, list(faults), 0

    def __getattr__(self, name):
        return getattr(self._array, name)

    def read(self, *args, **options):
        self.reads += 1
        if self.faults:
            raise self.faults.pop(0)
        return self._array.read(*args, **options)


CURL = "S3: Failed to get object [HTTP Response Code: -1] : curlCode: 28, Timeout was reached"


def test_a_transient_fault_is_read_over(release, made, monkeypatch, caplog):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(census_source, "ROWS_A_READ", 20)
    source = source_of(release, made, LUNG)
    source._raw = Faulty(source._raw, tiledbsoma.SOMAError(CURL), ConnectionResetError("reset"))
    np.testing.assert_array_equal(source.read(0, 50).toarray(), made.counts[:50, :60])
    assert source._raw.reads == 5
    assert "dataset aaaa-lung, X/raw of joinids 0 to 19: try 1 of 5 failed" in caplog.text


def test_a_fault_that_stays_names_block_and_remedy(release, made, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(census_source, "ROWS_A_READ", 20)
    source = source_of(release, made, LUNG)
    source._raw = Faulty(source._raw, *[tiledbsoma.SOMAError(CURL)] * 9)
    told = r"dataset aaaa-lung, X/raw of joinids 0 to 19: failed 5 times, .*curlCode: 28.*run the same command again"
    with pytest.raises(OSError, match=told):
        source.read(0, 50)


def test_damage_is_told_at_once(made, copy):
    for path in (copy / "census_data/homo_sapiens/ms/RNA/X/raw").rglob("a0.tdb"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2 :] = b"\0" * (len(content) - len(content) // 2)
        path.write_bytes(content)
    with open_census(uri=str(copy)) as opened, source_of(opened, made, LUNG) as source:
        with pytest.raises(
            ValueError, match="dataset aaaa-lung, X/raw of joinids 0 to 49: cannot be read: .*run the same"
        ):
            source.read(0, 50)


RAW = "census_data/homo_sapiens/ms/RNA/X/raw"


def add_count(copy, row, gene, value):
    with tiledbsoma.open(str(copy / RAW), "w") as writer:
        data = pa.array([value], pa.float32())
        writer.write(pa.table({"soma_dim_0": [row], "soma_dim_1": [gene], "soma_data": data}))


def test_counts_outside_the_panel_are_refused(made, copy):
    add_count(copy, 4, 79, 3.0)
    with open_census(uri=str(copy)) as opened:
        for options in ({}, {"var_filter": parse("feature_type == 'lncRNA'")}):
            with pytest.raises(ValueError, match="dataset aaaa-lung, X/raw of joinids .*outside the dataset's panel"):
                source_of(opened, made, LUNG, **options).read(0, 50)


def test_values_stored_twice_are_refused(made, copy):
    gene = int(np.flatnonzero(made.counts[4])[0])
    add_count(copy, 4, gene, 3.0)
    with open_census(uri=str(copy)) as opened, pytest.raises(ValueError, match="1 values are stored twice"):
        source_of(opened, made, LUNG).read(0, 50)


def test_panels_that_disagree_with_obs_are_refused(made, copy):
    with tiledbsoma.open(str(copy / "census_data/homo_sapiens/ms/RNA/feature_dataset_presence_matrix"), "w") as writer:
        writer.write(pa.table({"soma_dim_0": [1], "soma_dim_1": [0], "soma_data": [True]}))
    with open_census(uri=str(copy)) as opened:
        told = "dataset bbbb-blood: the presence matrix has 61 measured genes, but obs.n_measured_vars says 60"
        with pytest.raises(ValueError, match=told):
            source_of(opened, made, BLOOD).obs(0, 5)


def test_joinids_that_are_not_the_datasets_are_refused(release, made):
    with pytest.raises(ValueError, match="joinids of other datasets among its own: "):
        source_of(release, made, LUNG, [48, 49, 50]).obs(0, 3)
    for joinids in ([], [3, 3], [5, 4]):
        with pytest.raises(ValueError, match="joinids must be ascending and at least one"):
            source_of(release, made, LUNG, np.array(joinids, np.int64))
    with pytest.raises(ValueError, match="has no dataset 'nothing'"):
        CensusSource(release, "homo_sapiens", "nothing", np.array([0]))


def test_lost_samples_are_told(made, copy):
    with tiledbsoma.open(str(copy / "census_data/homo_sapiens/obs"), "d") as frame:
        frame.delete_cells((slice(10, 12),))
    with open_census(uri=str(copy)) as opened, source_of(opened, made, LUNG) as source:
        with pytest.raises(ValueError, match="obs has 47 of the 50 joinids 0 to 49"):
            source.obs(0, 50)


# --- our own store ---------------------------------------------------------------------------------------------------


def test_our_own_store_is_read_the_same_way(tiny_store, tiny_files):
    with open_census(uri=str(tiny_store)) as opened:
        chosen = plan(opened, obs_filter="cell_type == 'B cell' and modality in ['sc', 'bulk']")
        assert [part.dataset_id for part in chosen.datasets] == ["first", "second"]
        for part, path in zip(chosen.datasets, tiny_files, strict=True):
            expected = ad.read_h5ad(path)
            expected = expected[expected.obs["cell_type"] == "B cell"]
            with chosen.source(part) as source:
                rows = source.read(0, source.n_obs)
                assert rows.dtype == np.uint32 and source.gene_ids == tuple(expected.var_names)
                np.testing.assert_array_equal(rows.toarray(), expected.X.toarray())
                obs = source.obs(0, source.n_obs)
                assert obs.index.tolist() == expected.obs_names.tolist()
                assert obs["batch"].tolist() == expected.obs["batch"].tolist()
                np.testing.assert_array_equal(obs["raw_sum"], expected.X.toarray().sum(axis=1))
        with pytest.raises(ValueError, match=r"near it: \['first'\]"):
            plan(opened, dataset_ids=["frist"])

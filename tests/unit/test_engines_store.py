"""The private store: what was built here comes back, everything else is refused before a byte of it is given out."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.bundle import Bundle
from runtime.engine_store import EngineKey, EngineLimits, EngineStore, Target, default_root, engine_keys
from runtime.errors import UsageError
from tests.parity.dense_models import MODELS, make_bundle
from tests.unit.fake_tensorrt import engine_bytes

TARGET = Target("tensorrt", "10.3.0", "Orin sm_87 x8")
OPTIONS = EngineLimits(128, 32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle") / "b", MODELS["mqa-gelu-tied"]).path)


@pytest.fixture
def key(bundle: Bundle) -> EngineKey:
    return engine_keys(bundle, TARGET, OPTIONS)["layer_00"]


@pytest.fixture
def store(bundle: Bundle, tmp_path: Path) -> EngineStore:
    return EngineStore(bundle.manifest, tmp_path / "store")


def put(store: EngineStore, key: EngineKey, data: bytes = engine_bytes(1)) -> Path:
    store.begin(key).write_bytes(data)
    return store.commit(key, {"seconds": 1.5}).path


def test_what_was_built_comes_back(store: EngineStore, key: EngineKey) -> None:
    assert store.find(key) is None
    path = put(store, key)
    found = store.find(key)
    assert found is not None and (found.path, found.bytes, found.facts) == (path, 128, {"seconds": 1.5})
    assert bytes(store.read(key)) == engine_bytes(1)
    modes = [p.stat().st_mode & 0o777 for p in (store.root, store.folder, path, path.with_suffix(".json"))]
    assert modes == [0o700, 0o700, 0o600, 0o600]


def test_a_key_changes_with_everything_an_engine_depends_on(bundle: Bundle, key: EngineKey) -> None:
    others = [
        replace(key, part="layer_01"),
        replace(key, sources={**key.sources, "dense/layer_00.safetensors": "0" * 64}),
        replace(key, flavour="tensorrt-rtx"),
        replace(key, version="10.3.1"),
        replace(key, gpu="Orin sm_87 x4"),
        replace(key, options=replace(OPTIONS, context=256)),
        replace(key, options=replace(OPTIONS, prefill=16)),
        replace(key, options=replace(OPTIONS, workspace_bytes=1)),
    ]
    assert len({k.digest() for k in [key, *others]}) == 9
    assert set(key.sources) == {"dense/layer_00.fp16.onnx", "dense/layer_00.safetensors"}
    # A tied head's weights lie in the embedding's file.
    assert "dense/embed.safetensors" in engine_keys(bundle, TARGET, OPTIONS)["head"].sources


def test_stale_engines_are_not_found_and_can_be_told(store: EngineStore, key: EngineKey) -> None:
    path = put(store, key)
    newer = replace(key, version="10.4.0")
    assert store.find(newer) is None
    assert store.others([newer]) == [path, path.with_suffix(".json")]
    assert store.others([key]) == []


def test_a_changed_engine_is_refused(store: EngineStore, key: EngineKey) -> None:
    path = put(store, key)
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="changed since it was built, so it is not loaded"):
        store.read(key)


def test_an_engine_from_another_machine_is_refused(bundle: Bundle, key: EngineKey, tmp_path: Path) -> None:
    """Same key, right hash in its description, but that was sealed with another machine's secret."""
    theirs, ours = (EngineStore(bundle.manifest, tmp_path / name) for name in ("theirs", "ours"))
    path = put(theirs, key, engine_bytes(666))
    put(ours, replace(key, part="layer_01"))
    for file in (path, path.with_suffix(".json")):
        shutil.copy2(file, ours.folder / file.name)
    for verb in (ours.find, ours.read):
        with pytest.raises(UsageError, match="was not built here by this user, so it is not loaded"):
            verb(key)


@pytest.mark.parametrize("field", ["bytes", "sha256", "facts", "key", "mac"])
def test_an_edited_description_is_refused(store: EngineStore, key: EngineKey, field: str) -> None:
    sidecar = put(store, key).with_suffix(".json")
    record = json.loads(sidecar.read_text())
    record[field] = {"bytes": 127, "facts": {}, "key": {**record["key"], "gpu": "x"}}.get(field, "0" * 64)
    sidecar.write_text(json.dumps(record))
    with pytest.raises(UsageError, match="was not built here"):
        store.read(key)


def test_links_and_open_permissions_are_refused(store: EngineStore, key: EngineKey, tmp_path: Path) -> None:
    path = put(store, key)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="not a whole file of this user alone"):
        store.read(key)
    path.chmod(0o600)
    moved = path.rename(tmp_path / "engine")
    path.symlink_to(moved)
    with pytest.raises(UsageError, match="so it is not loaded"):
        store.read(key)
    path.unlink()
    os.link(moved, path)
    with pytest.raises(UsageError, match="not a whole file"):
        store.read(key)
    store.root.chmod(0o755)
    with pytest.raises(UsageError, match="open to others than this user.*chmod 700"):
        store.read(key)


def test_an_unfinished_build_is_no_engine(store: EngineStore, key: EngineKey) -> None:
    """Killed while TensorRT wrote, or before the description was there."""
    store.begin(key).write_bytes(b"half")
    assert store.find(key) is None
    path = put(store, key)
    path.with_suffix(".json").unlink()
    assert store.find(key) is None
    with pytest.raises(UsageError, match="no such engine: run `edge engines BUNDLE`"):
        store.read(key)


def test_timings_are_sealed(store: EngineStore, key: EngineKey) -> None:
    """TensorRT parses them, so a foreign file is left alone; those of another GPU lie elsewhere."""
    assert store.read_timing_cache(key) == b""
    put(store, key)
    store.write_timing_cache(key, b"timings")
    assert store.read_timing_cache(key) == b"timings"
    assert store.read_timing_cache(replace(key, part="mlp_00")) == b"timings"
    assert store.read_timing_cache(replace(key, gpu="other")) == b""
    path = store.timing_cache(key)
    path.write_bytes(path.read_bytes()[:-1] + b"S")
    assert store.read_timing_cache(key) == b""


def test_one_builder_at_a_time(bundle: Bundle, store: EngineStore) -> None:
    with store.locked(), pytest.raises(UsageError, match="another process builds engines"):  # noqa: SIM117
        with EngineStore(bundle.manifest, store.root).locked():
            pass
    with store.locked():
        pass


def test_options_of_what_is_there(store: EngineStore, key: EngineKey) -> None:
    assert store.built_options() == []
    large = replace(OPTIONS, context=4096)
    put(store, replace(key, options=large))
    put(store, key)
    put(store, replace(key, part="head"))
    assert store.built_options() == [OPTIONS, large]


def test_where_the_store_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REMOE_EDGE_ENGINES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "remoe-edge" / "engines"
    monkeypatch.setenv("REMOE_EDGE_ENGINES", str(tmp_path / "nvme"))
    assert default_root() == tmp_path / "nvme"

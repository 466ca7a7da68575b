"""Settings: where they come from, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest

from hopcoll.config import Config


def test_defaults():
    config = Config.collect({})
    assert config == Config()
    assert config.chunk_bytes == 65536
    assert config.window_chunks == 16
    assert config.eager_bytes == 4096
    assert config.progress == "thread"
    assert config.timeout_s is None
    assert config.connect_timeout_s == 60.0


def test_every_field_has_a_variable():
    environ = {
        "HOPCOLL_CHUNK_BYTES": "128",
        "HOPCOLL_WINDOW": "3",
        "HOPCOLL_EAGER_BYTES": "0",
        "HOPCOLL_PROGRESS": "inline",
        "HOPCOLL_TIMEOUT_S": "2.5",
        "HOPCOLL_DETECT_S": "5",
        "HOPCOLL_LATE_BYTES": "100",
        "HOPCOLL_OBJECT_BYTES": "200",
        "HOPCOLL_OBJECT_SCRATCH": "/scratch",
        "HOPCOLL_OBJECT_SCRATCH_BYTES": "300",
        "HOPCOLL_INLINE_BYTES": "1024",
        "HOPCOLL_TRACE": "/traces",
        "HOPCOLL_TRACE_BYTES": "65536",
        "HOPCOLL_CONNECT_TIMEOUT_S": "7",
    }
    taken = (128, 3, 0, "inline", 2.5, 5.0, 100, 200, "/scratch", 300, 1024, "/traces", 65536, 7.0)
    assert dataclasses.astuple(Config.collect(environ)) == taken
    assert Config.collect({"HOPCOLL_DETECT_S": "inf"}).detect_s is None


def test_an_argument_wins_over_the_environment():
    environ = {"HOPCOLL_WINDOW": "3", "HOPCOLL_CHUNK_BYTES": "128"}
    config = Config.collect(environ, window_chunks=5, chunk_bytes=None)
    assert config.window_chunks == 5
    assert config.chunk_bytes == 128


def test_a_wrong_variable_that_an_argument_overrules_is_not_looked_at():
    assert Config.collect({"HOPCOLL_WINDOW": "many"}, window_chunks=5).window_chunks == 5


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_is_not_set(text):
    assert Config.collect({"HOPCOLL_WINDOW": text}).window_chunks == 16


def test_infinity_is_no_limit():
    assert Config(timeout_s=math.inf).timeout_s is None
    assert Config.collect({"HOPCOLL_TIMEOUT_S": "inf"}).timeout_s is None
    # An argument can take back what the environment set.
    assert Config.collect({"HOPCOLL_TIMEOUT_S": "3"}, timeout_s=math.inf).timeout_s is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("chunk_bytes", 0),
        ("chunk_bytes", -64),
        ("chunk_bytes", 100),
        ("chunk_bytes", (1 << 30) + 64),
        ("window_chunks", 0),
        ("window_chunks", 1025),
        ("eager_bytes", -1),
        ("eager_bytes", 32769),
        ("progress", "threads"),
        ("timeout_s", -1),
        ("timeout_s", math.nan),
        ("detect_s", 0),
        ("detect_s", 0.1),
        ("late_bytes", -1),
        ("object_bytes", -1),
        ("inline_bytes", 511),
        ("inline_bytes", 65537),
        ("connect_timeout_s", -0.5),
        ("connect_timeout_s", math.inf),
    ],
)
def test_out_of_range(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} "):
        Config(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("chunk_bytes", 64.0),
        ("chunk_bytes", "64"),
        ("window_chunks", True),
        ("eager_bytes", None),
        ("timeout_s", "3"),
        ("timeout_s", False),
        ("timeout_s", [1]),
    ],
)
def test_wrong_type(setting, value):
    with pytest.raises(TypeError, match=f"^{setting} must be"):
        Config(**{setting: value})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("HOPCOLL_WINDOW", "many"),
        ("HOPCOLL_WINDOW", "0"),
        ("HOPCOLL_CHUNK_BYTES", "64.0"),
        ("HOPCOLL_PROGRESS", "Thread"),
        ("HOPCOLL_TIMEOUT_S", "soon"),
        ("HOPCOLL_TIMEOUT_S", "-1"),
    ],
)
def test_a_wrong_variable_is_called_by_its_name(variable, text):
    with pytest.raises(ValueError, match=f"^{variable}"):
        Config.collect({variable: text})


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(TypeError, match="^chunk_size is not a setting.*chunk_bytes"):
        Config.collect({}, chunk_size=64)


def test_agreed_settings_are_what_the_wire_depends_on():
    config = Config()
    assert hash(config.agreed()) == hash(Config(timeout_s=1, progress="inline").agreed())
    changes = ({"chunk_bytes": 128}, {"window_chunks": 2}, {"eager_bytes": 64}, {"detect_s": 9})
    for changed in (*changes, {"inline_bytes": 600}):
        assert Config(**changed).agreed() != config.agreed()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().chunk_bytes = 64

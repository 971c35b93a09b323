from collections.abc import Iterator
from dataclasses import replace

import gin
import pytest

from src.config import Refused
from src.data import digits, first_available
from src.data.dataset import Data, Unavailable


def missing() -> Data:
    raise Unavailable("The server is on the moon.\nGo there.")


def also_missing() -> Data:
    raise Unavailable("The dog ate it.")


def test_first_is_taken_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    data = first_available([digits, missing])
    assert (data.name, data.choice) == ("digits", 0)
    assert capfd.readouterr() == ("", "")


def test_next_is_taken_loudly(capfd: pytest.CaptureFixture[str]) -> None:
    data = first_available([missing, also_missing, digits])
    assert data == replace(data, choice=2)
    assert data.fingerprint == digits().fingerprint
    out, err = capfd.readouterr()
    assert out == ""
    assert "TRAINING ON digits, NOT ON missing" in err
    for reason in ("The server is on the moon.", "Go there.", "The dog ate it."):
        assert f"\n    {reason}\n" in err


def test_none_is_refused_with_all_reasons() -> None:
    with pytest.raises(Refused) as refused:
        first_available([missing, also_missing])
    assert not isinstance(refused.value, Unavailable)
    for text in ("none of 2", "missing:", "on the moon", "also_missing:", "The dog ate it."):
        assert text in refused.value.message
    with pytest.raises(Refused, match="none of 0"):
        first_available([])


def test_other_mistakes_are_not_passed_over() -> None:
    def wrong() -> Data:
        return digits(n_train=0)

    with pytest.raises(Refused, match="n_train = 0"):
        first_available([wrong, digits])


@pytest.fixture
def clean_gin() -> Iterator[None]:
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.mark.usefixtures("clean_gin")
def test_configured_by_gin(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    gin.parse_config(
        "first_available.of = [@cifar10, @digits]\n"
        "cifar10.url = 'http://127.0.0.1:9/cifar.tar.gz'\n"
        "digits.n_train = 64\n"
    )
    data = gin.get_configurable("first_available")()
    assert (data.name, data.choice, len(data.train)) == ("digits", 1, 64)
    assert "TRAINING ON digits, NOT ON cifar10" in capfd.readouterr().err

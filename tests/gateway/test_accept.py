"""What a client wants to be answered with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.errors import NotAcceptableError
from safelight.gateway.accept import Wanted


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/json",
        "application/*",
        "text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8",
        "image/jpeg, application/json",
        "image/*;q=0.9, application/json",
        "image/png, */*;q=0.1",
        "image/*;q=0, */*",
        "image/jpeg;q=0, image/*, application/json;q=0.1",
        "APPLICATION/JSON",
        " , application/json ,, ",
        "application/json; charset=utf-8",
        "image/avif,image/webp,image/apng,image/svg+xml,image/*;q=0.5,*/*;q=0.8",
    ],
)
def test_json(accept: str) -> None:
    assert Wanted(accept).image("image/jpeg") is False


@pytest.mark.parametrize(
    "accept",
    [
        "image/*",
        "image/jpeg",
        "image/jpeg;q=0.1",
        "IMAGE/JPEG",
        "image/jpeg, application/json;q=0.9",
        "image/jpeg, */*;q=0.9",
        "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
        "application/json;q=0, */*",
        "image/webp, image/jpeg;q=0.5, application/json;q=0.4",
        "image/png;q=0.1, image/*",
        "image/jpeg;v=1;q=1",
    ],
)
def test_the_image(accept: str) -> None:
    assert Wanted(accept).image("image/jpeg") is True


@pytest.mark.parametrize(
    "accept", ["text/html", "application/xml", "image/*;q=0", "*/*;q=0", "nonsense", "application/json;q=x"]
)
def test_nothing_that_there_is_at_once(accept: str) -> None:
    with pytest.raises(NotAcceptableError):
        Wanted(accept)


def test_an_image_of_another_type_than_the_result() -> None:
    with pytest.raises(NotAcceptableError, match="result is image/jpeg"):
        Wanted("image/png").image("image/jpeg")


def test_an_image_where_there_is_none() -> None:
    with pytest.raises(NotAcceptableError, match="made no image"):
        Wanted("image/*").image(None)


@pytest.mark.parametrize("quality", ["nan", "-1", "0", "0.0", "-inf"])
def test_a_quality_that_is_none_or_odd_allows_nothing(quality: str) -> None:
    with pytest.raises(NotAcceptableError):
        Wanted(f"application/json;q={quality}")


RANGE = st.sampled_from(["*/*", "image/*", "image/jpeg", "image/png", "application/json", "text/html"])
PART = st.builds(lambda name, q: f"{name};q={q}", RANGE, st.sampled_from(["0", "0.2", "0.5", "1"]))


@settings(deadline=None)
@given(st.lists(PART, max_size=5) | st.lists(st.text(max_size=20), max_size=5))
def test_any_header_is_json_or_the_image_or_406(parts: list[str]) -> None:
    def chosen(order: list[str]) -> bool | None:
        try:
            return Wanted(",".join(order)).image("image/jpeg")
        except NotAcceptableError:
            return None

    assert chosen(parts) is chosen(parts[::-1])

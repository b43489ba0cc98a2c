import pytest

from vmthunder.errors import InvalidName
from vmthunder.ids import image_id, image_name


@pytest.mark.parametrize("text", ["debian-12", "a", "Ubuntu_24.04-x86", "0", "x" * 200])
def test_ordinary_names_are_taken(text: str) -> None:
    assert image_name(text) == text


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a/b", "/a", "a..b", "-a", ".a", "ü", "a b", "a\n", "a\0", "x" * 201, "0" * 64, "F" * 64]
)
def test_names_that_could_be_taken_for_more_are_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        image_name(text)


@pytest.mark.parametrize("text", ["", "0" * 63, "A" * 64, "g" * 64])
def test_an_image_id_is_64_lower_case_digits(text: str) -> None:
    with pytest.raises(InvalidName):
        image_id(text)

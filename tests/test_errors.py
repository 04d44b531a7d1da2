"""Messages for mistakes that the user can mend."""

import pytest

from common.errors import first_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("one\ntwo"), "one"),
        (OSError("\n  one \ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_first_line(error: Exception, expected: str) -> None:
    assert first_line(error) == expected

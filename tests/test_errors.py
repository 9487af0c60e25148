"""What bad input is told: one line, whatever was given."""

import pytest
import torch

from loopmdm.errors import InputError, nearest, number, whole


@pytest.mark.parametrize("check", [whole, number])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-3, "steps is -3; it must be"),
        ("many", "steps is 'many'; it must be"),
        (torch.ones(3, 3), r"steps is a Tensor \[3, 3\]; it must be"),
        (list(range(100)), "steps is a list; it must be"),
        ("a\nb" * 99, "steps is a str; it must be"),
    ],
)
def test_one_line_says_what_was_given(check, value, said):
    with pytest.raises(InputError, match=f"^{said}") as caught:
        check("steps", value)
    assert "\n" not in str(caught.value)


def test_the_nearest_name_to_anything():
    known = ("factor", "threshold")
    assert nearest("tresh", known) == "; did you mean 'threshold'?"
    for other in (None, 3, torch.ones(3, 3), "zzz"):
        assert nearest(other, known) == "; known: factor, threshold"

"""Every numbered equation of the book stands in a chapter, above a line of code, and in a test that holds."""

import pytest

from docs.equations import equations
from tests.equations.check import all_checks

CHECKS = all_checks()


@pytest.mark.parametrize("id", CHECKS)
def test_line_computes_what_the_equation_says(id):
    assert CHECKS[id].error <= CHECKS[id].within


def test_every_equation_is_in_the_book_in_the_code_and_in_a_test():
    assert [e.id for e in equations() if not (e.chapter and e.path and e.test_path)] == []


def test_there_are_at_least_forty_equations():
    assert len(equations()) >= 40

"""The field `priority` of every body that asks for work reaches the engine, or is refused."""

import pytest

from tests.server.running import TEXT
from tests.server.test_deadlines import ROUTES


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(("given", "heard"), [
    ({}, 0), ({"priority": None}, 0), ({"priority": -7}, -7), ({"priority": 3.0}, 3),
    ({"priority": -(2**63)}, -(2**63)), ({"priority": 2**63 - 1}, 2**63 - 1),
])  # fmt: skip
def test_the_engine_hears_the_priority(up, path, body, given, heard):
    assert up.post(path, body | given).status_code == 200
    assert up.engine.submitted[-1].priority == heard


def test_all_prompts_of_a_body_have_its_priority(up):
    assert up.post("/v1/completions", {"prompt": [TEXT, "b"], "priority": 2}).status_code == 200
    assert [request.priority for request in up.engine.submitted[-2:]] == [2, 2]


BAD = ["1", "high", True, 0.5, [1], {}, 2**63, -(2**63) - 1, 1e300]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("value", BAD, ids=repr)
def test_what_is_no_integer_of_64_bits_is_a_400_that_names_the_field(up, path, body, value):
    n_submitted = len(up.engine.submitted)
    answer = up.post(path, body | {"priority": value})
    assert answer.status_code == 400
    if value != -(2**63) - 1:  # which JSON's parser reads as no integer
        assert answer.json()["error"]["param"] == "priority"
    assert len(up.engine.submitted) == n_submitted

"""What is read of a request on its way."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.cluster.ticket import DEFAULT_TOKENS, MAX_TOKENS, Ticket, read_ticket

STORY = "Tom went to the market. " * 40


def ticket(**fields) -> Ticket:
    return read_ticket(orjson.dumps(fields))


def test_it_costs_what_its_prompt_has_and_its_answer_may_have():
    short, long = ticket(prompt="Hi", max_tokens=1), ticket(prompt=STORY, max_tokens=1)
    assert long.cost - short.cost == len(STORY) // 4
    assert ticket(prompt="Hi", max_tokens=101).cost - short.cost == 100
    assert ticket(prompt="Hi").cost - short.cost == DEFAULT_TOKENS - 1
    assert ticket(prompt=["Hi"] * 3, n=2, max_tokens=100).cost > 600


def test_prompts_that_start_alike_share_prefixes_up_to_where_they_part():
    one, other = ticket(prompt=STORY + "A" * 900), ticket(prompt=STORY + "B" * 900)
    n_shared = sum(a == b for a, b in zip(one.prefixes, other.prefixes, strict=True))
    assert 0 < n_shared < len(one.prefixes)
    assert one.prefixes[:n_shared] == other.prefixes[:n_shared]


def test_the_next_turn_of_a_chat_has_the_prefixes_of_the_last():
    turns = [{"role": "user", "content": STORY}]
    first = ticket(messages=turns)
    later = ticket(messages=[*turns, {"role": "assistant", "content": "Yes."}])
    assert later.prefixes[: len(first.prefixes)] == first.prefixes


@given(st.binary() | st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(
        st.sampled_from(["prompt", "n", "max_tokens", "messages", "tools", "input"]), children
    ),
).map(orjson.dumps))  # fmt: skip
def test_any_body_has_a_ticket_whose_cost_is_bounded(body):
    found = read_ticket(body)
    assert 1 <= found.cost <= MAX_TOKENS + len(body)
    assert len(found.prefixes) < 16

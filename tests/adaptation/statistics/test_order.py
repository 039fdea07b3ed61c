"""The order that traces of forward passes show."""

from __future__ import annotations

from adamerging.adaptation.statistics.order import order_of
from adamerging.blocks import places


def test_blocks_run_in_the_order_of_use_and_what_has_no_map_is_the_rest():
    names = ["embed.weight", "h.0.a", "h.0.bias", "h.1.a", "h.1.b", "norm.weight", "head.weight"]
    order = order_of([["h.1.a", "h.1.b", "h.0.a", "head.weight"]], names, places(names))
    assert order.groups == [["h.1.a", "h.1.b"], ["h.0.a", "h.0.bias"], ["head.weight"]]
    assert order.rest == ["embed.weight", "norm.weight"]
    assert order.is_after("h.0.a", 0) and order.is_after("head.weight", 1)
    assert not order.is_after("h.1.b", 0) and not order.is_after("h.1.b", 1)


def test_a_part_that_only_one_task_has_stands_where_it_runs():
    names = ["first", "text", "image", "last"]
    order = order_of([["first", "text", "last"], ["first", "image", "last"]], names, places(names))
    assert [group[0] for group in order.groups] in (
        ["first", "text", "image", "last"],
        ["first", "image", "text", "last"],
    )


def test_a_part_that_runs_again_later_is_not_left_early():
    names = ["a", "b"]
    order = order_of([["a", "b", "a"]], names, places(names))
    assert order.again == {0}
    assert not order.is_after("b", 0)

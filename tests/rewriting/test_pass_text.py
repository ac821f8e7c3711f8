"""Passes as text: what is written, what is read, and where a malformed text goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from biofx.errors import PipelineError
from biofx.operators.rate_sampling import Distribution
from biofx.rewriting.pass_text import ParsedItem, format_item, format_value, parse_items, parse_value

VALUES: list[tuple[Any, str]] = [
    (None, "none"),
    (True, "true"),
    (False, "false"),
    (3, "3"),
    (-3, "-3"),
    (0.16, "0.16"),
    (1e-300, "1e-300"),
    (1e16, "1e+16"),
    (-0.0, "-0.0"),
    ("layer1.*", "layer1.*"),
    ("fc#1", "fc#1"),
    ("conv?", "conv?"),
    ("true", '"true"'),
    ("none", '"none"'),
    ("0", '"0"'),
    ("0.conv", '"0.conv"'),
    ("", '""'),
    ("a b", '"a b"'),
    ('say "hi"', '"say \\"hi\\""'),
    ("back\\slash", '"back\\\\slash"'),
    ("line\nbreak", '"line\\nbreak"'),
    ("re:layer[12]", '"re:layer[12]"'),
    ("type:torch.nn.modules.conv.Conv2d", '"type:torch.nn.modules.conv.Conv2d"'),
    ("Mäder", '"Mäder"'),
    ((), "[]"),
    (("a", 1, ("b",)), "[a,1,[b]]"),
]


def read_back(text: str) -> Any:
    (item,) = parse_items(f"p{{x={text}}}")
    return item.options["x"]


@pytest.mark.parametrize(("value", "text"), VALUES)
def test_a_value_is_written_and_read_back(value: Any, text: str) -> None:
    written = format_value(value)
    assert text in (written, f'"{written}"')
    assert read_back(written) == value
    assert type(read_back(written)) is type(value)
    assert read_back(text) == value


@given(value=st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
def test_any_plain_value_is_read_back(value: object) -> None:
    found = read_back(format_value(value))
    assert (found, type(found)) == (value, type(value))


def test_a_list_is_read_back_as_a_tuple() -> None:
    assert read_back(format_value(["a", "b"])) == ("a", "b")


def test_a_member_of_an_enum_is_its_value() -> None:
    assert format_value(Distribution.GAMMA) == "gamma"


def test_an_activation_of_torch_is_its_name() -> None:
    assert format_value(torch.tanh) == "torch.tanh"


def named(x: object) -> object:
    return x


class Callable:
    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("value", "text"), [(named, "<named>"), (lambda x: x, "<lambda>"), (Callable(), "<Callable>")]
)
def test_what_no_text_can_carry_shows_and_does_not_parse(value: object, text: str) -> None:
    assert format_value(value) == text
    with pytest.raises(PipelineError, match="expected something readable at 4, found '<"):
        parse_items(f"p{{x={text}}}")


def test_an_item_is_its_name_its_options_and_its_overrides() -> None:
    text = format_item(
        "p", {"a": 1, "only": ("x", "y z")}, [("fc", {"a": 2, "b": True}), (("u", "v"), {"a": 3})]
    )
    assert text == 'p{a=1,only=[x,"y z"],@fc{a=2,b=true},@[u,v]{a=3}}'
    overrides = (("fc", {"a": 2, "b": True}), (("u", "v"), {"a": 3}))
    assert parse_items(text) == (ParsedItem("p", {"a": 1, "only": ("x", "y z")}, overrides),)


def test_an_item_without_options_is_its_name() -> None:
    assert format_item("p", {}, []) == "p"
    assert parse_items("p{}") == parse_items("p") == (ParsedItem("p", {}, ()),)


def test_a_group_holds_items_and_options() -> None:
    inner = (ParsedItem("a", {}, ()), ParsedItem("b", {"x": 1}, ()))
    assert parse_items("(a,b{x=1}){only=fc},c") == (
        ParsedItem(None, {"only": "fc"}, (), inner),
        ParsedItem("c", {}, ()),
    )


def test_white_space_means_nothing() -> None:
    loose = ' ( a , b { x = 1 ,\n @ "fc" { y = [ 2 , 3 ] } } ) { only = fc } , c '
    assert parse_items(loose) == parse_items("(a,b{x=1,@fc{y=[2,3]}}){only=fc},c")


def test_an_empty_text_holds_nothing() -> None:
    assert parse_items("") == parse_items("  \n") == ()
    assert parse_items("()") == (ParsedItem(None, {}, ()),)


MALFORMED: list[tuple[str, str]] = [
    (",", "expected the name of a pass at 0, found ','"),
    ("a,", "expected the name of a pass at 2, found the end"),
    ("a,,b", "expected the name of a pass at 2, found ',b'"),
    ("a b", "expected ',' between passes at 2, found 'b'"),
    ("3", "expected the name of a pass at 0, found '3'"),
    ('"a"', "expected the name of a pass at 0"),
    ("a{", "expected an option's name at 2, found the end"),
    ("a}", "expected ',' between passes at 1, found '}'"),
    ("a{x}", "expected '=' after 'x' at 3, found '}'"),
    ("a{x=}", "expected a value at 4, found '}'"),
    ("a{x=", "expected a value at 4, found the end"),
    ("a{x=1", "expected ',' or '}' at 5, found the end"),
    ("a{x=1 y=2}", "expected ',' or '}' at 6, found 'y=2}'"),
    ("a{x=1,}", "expected an option's name at 6, found '}'"),
    ("a{,x=1}", "expected an option's name at 2"),
    ("a{x=1,x=2}", "expected option 'x' only once at 7"),
    ("a{=1}", "expected an option's name at 2"),
    ("a{1=1}", "expected an option's name at 2"),
    ("a{x=[1}", "expected ',' or ']' at 6, found '}'"),
    ("a{x=[1,]}", "expected a value at 7, found ']}'"),
    ("a{x=[1 2]}", "expected ',' or ']' at 7"),
    ("a{x=(1)}", "expected a value at 4, found '(1)}'"),
    ('a{x="open}', "expected something readable at 4, found '\"open}'"),
    ('a{x="\\q"}', "expected a text in double quotes with JSON's escapes at 4"),
    ('a{x="line\nbreak"}', "expected a text in double quotes with JSON's escapes at 4"),
    ("a{x=1;y=2}", "expected something readable at 5, found ';y=2}'"),
    ("a{x=<f>}", "expected something readable at 4"),
    ("a{@}", "expected a value at 3"),
    ("a{@fc}", "expected option=value in the braces of an override"),
    ("a{@fc{}}", "expected option=value in the braces of an override"),
    ("a{@fc{@b{x=1}}}", "expected option=value in the braces of an override"),
    ("(a", "expected ',' or ')' at 2, found the end"),
    ("a)", "expected ',' between passes at 1, found ')'"),
    ("(a,)", "expected the name of a pass at 3, found ')'"),
    ("(a)b", "expected ',' between passes at 3, found 'b'"),
    ("a{x=1}{y=2}", "expected ',' between passes at 6"),
    ("(" * 20_000, "nested too deeply"),
    ("a{x=" + "[" * 20_000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=lambda text: text[:20])
def test_a_malformed_text_is_an_error_that_shows_where(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse_items(text)
    assert str(caught.value).startswith("malformed pipeline text")
    assert message in str(caught.value)


@given(text=st.text(alphabet='ab{}()[],=@"\\1.-e#* \n', max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        items = parse_items(text)
    except PipelineError as error:
        assert str(error).startswith("malformed pipeline text")  # noqa: PT017
    else:
        assert all(item.name or item.name is None for item in items)


@pytest.mark.parametrize(("value", "text"), VALUES)
def test_one_value_alone_is_read_like_an_option(value: Any, text: str) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["a b", "re:x[12]", "[1", "1,2", "=", '"open', "[" * 20_000, "layer 1 "])
def test_what_is_no_value_stands_for_itself(text: str) -> None:
    assert parse_value(text) == text

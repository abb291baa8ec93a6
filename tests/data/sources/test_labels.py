import numpy as np
import pytest

from megabatch.data.sources.labels import agree_on_classes, find_classes, read_class_names
from megabatch.errors import DataError


class Labels:
    """A source of labels alone."""

    def __init__(self, labels: list[int], names: list[str]) -> None:
        self.labels, self.class_names = np.array(labels), tuple(names)


def classes(labels, names=None):
    return find_classes(dict.fromkeys(labels, "a.tar"), names, where="set")


@pytest.mark.parametrize(
    ("labels", "number", "names"),
    [
        (["0", "2", "1"], [0, 2, 1], ("0", "1", "2")),
        (["10", "2", "09"], [10, 2, 9], tuple(map(str, range(11)))),
        ([3, 0], [3, 0], ("0", "1", "2", "3")),
        ([1.0, 0.0], [1, 0], ("0", "1")),
        ([True, False], [1, 0], ("0", "1")),
        (["wolf", "cat"], [1, 0], ("cat", "wolf")),
        ([b"wolf", b"cat"], [1, 0], ("cat", "wolf")),
        (["wolf", "7"], [1, 0], ("7", "wolf")),
    ],
)
def test_numbers_are_class_numbers_and_anything_else_is_names(labels, number, names):
    found = classes(labels)
    assert [found.number[label] for label in labels] == number
    assert found.names == names
    assert found.numbered == (names[0] == "0")


def test_numbers_count_in_the_list_of_names_even_if_the_names_are_numbers():
    names = sorted(map(str, range(12)))  # '0', '1', '10', '11', '2', ...
    assert classes(["2", "10"], names).number == {"2": 2, "10": 10}
    assert classes(["1440764", "1443537"], ["1443537", "1440764"]).number == {"1440764": 1, "1443537": 0}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, "label -1 is not a class.*leave such images out"),
        ("-1", "label -1 is not a class"),
        (-1.0, "label -1 is not a class"),
        (" ", "a label is ' '"),
        (None, "a label is None"),
        (float("nan"), "a label is nan"),
        (0.5, "a label is 0.5"),
    ],
)
def test_what_cannot_be_a_class_is_refused_among_numbers_and_among_names(label, message):
    for others in (["0", "1"], ["cat"]):
        with pytest.raises(DataError, match=rf"a\.tar: {message}"):
            classes([*others, label])


def test_identifiers_are_refused_and_the_message_says_what_works():
    with pytest.raises(DataError, match=r"up to 20,231,104,000,001, but only 2 of them are used.*classes\.txt"):
        classes(["20231104000000", "20231104000001"])
    one = Labels([0, 999], [str(i) for i in range(1000)])
    with pytest.raises(DataError, match="up to 999, but only 2 of them are used"):
        agree_on_classes({"train": one}, "set", numbered=True)
    assert agree_on_classes({"train": one}, "set", numbered=False)  # a list of names says that there are so many


def test_a_small_val_does_not_make_numbers_identifiers():
    names = [str(i) for i in range(100)]
    val = Labels([99], names)
    assert "val has no images of 99 of the 100 classes: '0', '1', '2', ..." in agree_on_classes(
        {"train": Labels(list(range(99)), names[:99]), "val": val}, "set", numbered=True
    )
    assert val.labels.tolist() == [99]


def test_labels_are_matched_by_name():
    val = Labels([0, 1, 1], ["dog", "ant"])
    agree_on_classes({"train": Labels([0, 1, 2], ["ant", "cat", "dog"]), "val": val}, "set", numbered=False)
    assert val.labels.tolist() == [2, 0, 0]
    assert val.class_names == ("ant", "cat", "dog")
    with pytest.raises(DataError, match=r"'yak' and 1 more are only in val"):
        agree_on_classes(
            {"train": Labels([0], ["ant"]), "val": Labels([0], ["ant", "yak", "zebu"])}, "set", numbered=False
        )


def test_a_name_that_is_listed_twice_or_not_at_all_is_refused():
    with pytest.raises(DataError, match="two classes are named 'cat'"):
        classes(["0", "1"], ["cat", "dog", "cat"])
    with pytest.raises(
        DataError, match="label 'yak' is neither a class name nor a number below 2; the classes are cat"
    ):
        classes(["cat", "yak"], ["cat", "dog"])


@pytest.mark.parametrize("text", ["cat\ndog\n", "cat\ndog", "cat\r\ndog\r\n", "\ufeffcat\ndog\n"])
def test_class_names_are_read_as_any_editor_writes_them(text):
    assert read_class_names(text) == ["cat", "dog"]

"""Progress bars stay silent outside terminals."""

from editkit.base.progress import bar


def test_items_pass_and_nothing_is_printed(capsys):
    assert list(bar(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")

"""The report and the comparison: data are escaped, nothing is loaded, and every section has content."""

import re
from html.parser import HTMLParser

import pytest

from hf_prefopt.commands import main
from hf_prefopt.reporting.compare_page import comparison_notes, comparison_page, comparison_rows, run_names
from hf_prefopt.reporting.record import RunRecord, read_record, write_record
from hf_prefopt.reporting.report_page import color_scale, report_page
from tests.reporting.history import made_up_run

ALLOWED = """html head meta title style body main h1 h2 h3 bdi dl div dt dd section table thead tbody tr th td p figure
figcaption b span i svg path line text circle rect article header code ul li details summary footer"""


class Page(HTMLParser):
    """A parser that collects the elements, attributes and texts of a page; an
    element that is not closed raises an error.
    """

    VOID = ("meta", "path", "line")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.names, self.attributes, self.texts = [], set(), [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def pages() -> dict[str, str]:
    runs = [made_up_run("<script>alert(1)</script>"), made_up_run('"><img src=x onerror=alert(2)>')]
    return {"report": report_page(runs[0]), "comparison": comparison_page(runs, run_names(runs, ["a", "b"]))}


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_data_become_text_and_nothing_is_loaded(name):
    page = Page(pages()[name])
    assert page.names <= set(ALLOWED.split())
    assert not [key for key, _ in page.attributes if key.startswith("on") or key in ("src", "href")]
    assert "<script>alert(1)</script>" in "".join(page.texts)
    assert not re.search(r"url\(|@import|https?://", pages()[name])


def test_the_report_shows_what_the_record_has():
    text = "".join(Page(report_page(made_up_run())).texts)
    for said in ("83.3%", "always the longer one", "0.833", "Most right", "Row 4", "<script>alert('prompt')</script>"):
        assert said in text
    for said in ("What is <b>2</b>?", "| 5 <script>", "4<U+202E>", "rows that cannot be used: 2", "ℓ(βh)"):
        assert said in text
    for said in ("the adapter switched off", "shared, no padding", "python train.py --name '<script>'"):
        assert said in text


def test_the_report_says_whether_the_model_is_better_than_length():
    assert "Not clearly better than “always the longer one”" in "".join(Page(report_page(made_up_run())).texts)


def test_without_an_evaluation_after_training_the_report_says_so():
    record = made_up_run()
    record.logs = [log for log in record.logs if "eval_loss" not in log or log["step"] == 0]
    page = report_page(record)
    assert "No evaluation after training" in page and "held-out accuracy" not in page and "<h2>Results" not in page


def test_a_tokens_color_is_its_log_ratio():
    """The full color is the 95 % quantile of |log-ratio|: of 0.01, 0.01, 1.5, 1.5,
    2, 2 it is 2, so 1.5 is level 8 of 10.
    """
    record = made_up_run()
    assert color_scale(record) == 2.0
    page = report_page(record)
    assert '<span class="u a8" title="+1.500">Paris</span>' in page
    assert '<span class="d a10" title="-2.000">\n&lt;b&gt;</span>' in page
    assert '<span title="-0.010"> is</span>' in page


def test_warnings_stand_above_the_results():
    page = report_page(made_up_run(warnings=["step 3: chosen responses have become less likely"]))
    assert page.index("less likely") < page.index("<h2>Results</h2>")


def test_a_record_of_almost_nothing_has_a_page():
    page = report_page(RunRecord())
    assert "<h2>Curves</h2>" not in page and "<h2>Results</h2>" not in page and "nothing</li>" in page
    Page(page)


def test_a_record_is_written_and_read_again(tmp_path):
    record = made_up_run()
    record.examples[0]["margin"] = float("nan")
    path = write_record(record, tmp_path)
    found = read_record(tmp_path)
    assert found.examples[0]["margin"] is None
    assert (found.run, found.pairs, found.answers) == (record.run, record.pairs, record.answers)
    assert read_record(path).examples[1:] == record.examples[1:]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json\n", "line 1 is not a line of a run's record"),
        ('{"kind": "run"}\n[1]\n', "line 2 is not"),
        ('{"kind": "what"}\n', "kind 'what' is not one of"),
    ],
)
def test_a_broken_record_is_named_with_its_line(tmp_path, text, said):
    (tmp_path / "record.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_record(tmp_path)


def test_the_comparison_has_a_column_for_each_run():
    runs = [made_up_run("a"), made_up_run("b", steps=30)]
    rows = dict(comparison_rows(runs))
    assert rows["reward accuracy"] == ["0.833 [0.400, 0.970]"] * 2 and rows["optimizer steps"] == ["20", "30"]
    assert rows["loss"] == ["0.5930"] * 2 and "KL estimate on the data, per token" not in rows
    assert comparison_notes(runs, ["a", "b"]) == []


def test_runs_that_cannot_be_compared_say_so():
    other = made_up_run("b", base_model="another")
    other.examples = other.examples[:3]
    notes = comparison_notes([made_up_run("a"), other], ["a", "<b>"])
    assert "different examples" in notes[0] and notes[0].endswith(": a; <b>.")
    assert "different models: another, someone/<i>model</i>" in notes[1]


def test_runs_of_one_name_go_by_their_folders():
    assert run_names([made_up_run("a"), made_up_run("a")], ["x/a", "y/a"]) == ["x/a", "y/a"]
    assert run_names([made_up_run("a"), made_up_run("b")], ["x/a", "y/b"]) == ["a", "b"]


def test_the_commands_write_the_pages(tmp_path, capsys):
    for name in ("a", "b"):
        write_record(made_up_run(name), tmp_path / name)
    assert main(["report", str(tmp_path / "a")]) == 0
    assert "0.833" in capsys.readouterr().out
    assert "Most right" in (tmp_path / "a" / "report.html").read_text() and (tmp_path / "a" / "curves.png").exists()
    page = tmp_path / "both.html"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page)]) == 0
    assert "Comparison of 2 runs" in page.read_text() and "0.833" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "{folder}/none"], "none: there is no such folder"),
        (["compare", "{folder}/a"], "two runs or more"),
        (["compare", "{folder}/a", "{folder}/none"], "none: there is no such folder"),
        (["report", "{folder}/a", "--html", "/proc/none/x.html"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(tmp_path, capsys, arguments, said):
    write_record(made_up_run(), tmp_path / "a")
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 1
    assert said in capsys.readouterr().err

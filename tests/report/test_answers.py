"""Sample answers of all models to the same questions, and the paper's numbers."""

import json

from bmjax.evaluate.paper import ROWS
from bmjax.report.answers import KINDS, LONGEST_ANSWER, read_answers
from bmjax.report.page import write_report
from tests.report.page_parser import Page
from tests.report.synthetic import DOMAINS, synthetic_run


def test_one_question_of_each_kind_with_the_answer_of_every_model(run):
    directory, report, html = run
    answers, lacking = read_answers(directory, report["models"])
    assert list(answers) == list(DOMAINS) and lacking == []
    for domain, questions in answers.items():
        assert {question.kind: question.prompt for question in questions} == {
            "both are right": f"{domain} question 0",
            "the merged model is right, the backbone wrong": f"{domain} question 1",
            "the backbone is right, the merged model wrong": f"{domain} question 2",
            "both are wrong": f"{domain} question 3",
        }
        assert set(KINDS) == {question.kind for question in questions}
        for question in questions:
            assert list(question.answers) == [name for name in report["models"] if name != "merge/linear"]
    text = "".join(Page(html).texts)
    assert "merge/linear says 1" in text and "backbone says 1" in text


def test_long_answers_lose_their_middle_and_say_so(tmp_path):
    report = synthetic_run(tmp_path)
    path = tmp_path / report["models"]["backbone"]["samples"] / "math.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    samples[0]["answer"] = "beginning " + "x" * LONGEST_ANSWER + "</pre><script>\x1b[2J the end"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    html = write_report(tmp_path, report).read_text(encoding="utf-8")
    text = "".join(Page(html).texts)
    assert "beginning xxx" in text and "the end" in text
    assert f"{len(samples[0]['answer']) - LONGEST_ANSWER} characters left out" in text
    assert "<script" not in html and "\x1b" not in html


def test_samples_that_are_gone_are_named(tmp_path):
    report = synthetic_run(tmp_path)
    folder = tmp_path / report["models"]["mixture"]["samples"]
    (folder / "code.jsonl").unlink()
    (folder / "math.jsonl").write_text("not json\n")
    text = "".join(Page(write_report(tmp_path, report).read_text(encoding="utf-8")).texts)
    assert "mixture: " in text and "code.jsonl holds no sample" in text and "math.jsonl" in text


def test_the_papers_table_is_there_and_takes_rows_of_its_benchmarks(tmp_path):
    report = synthetic_run(tmp_path)
    page = Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    paper = {row[0]: row[1:] for row in page.rows if row and row[0] in ROWS}
    assert paper["DeepSeek-R1-Distill-Qwen-32B (backbone)"] == ["72.6", "57.2", "62.1"]
    assert list(paper) == list(ROWS)
    assert "was not tested on these benchmarks" in "".join(page.texts)

    report["config"]["domains"]["math"] = {"test": {"benchmark": "aime24", "data": "aime"}}
    for entry in report["models"].values():
        entry["scores"]["math"] |= {
            "samples": {"file": "samples/math.jsonl", "count": 23}, "k": 4, "n": 5, "truncated": 0.125, "unjudged": 3,
            "over_context": 2,
        }  # fmt: skip
    page = Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    accuracy = 100 * report["models"]["merged"]["scores"]["math"]["accuracy"]
    row = next(row for row in page.rows if row and row[0] == "merged (this run)")
    assert row[1].startswith(f"{accuracy:.1f} [") and row[2:] == ["–", "–"]
    assert "was not tested on these benchmarks" not in "".join(page.texts)
    # What a reader sees, not a pointer's tip, says where each number is from and what it leaves out.
    file = f"{report['models']['merged']['samples']}/math.jsonl"
    assert (tmp_path / file).is_file()
    assert ["merged", "AIME 2024", file, "23", "4", "5", "12.5 %", "3", "2"] in page.rows

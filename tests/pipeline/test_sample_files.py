"""Files of samples: what each kind holds, and every reading error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxpress.errors import RecipeError
from onnxpress.labelled import read_labelled
from onnxpress.sample_files import read_samples
from onnxpress.samples import Sample


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_columns_by_usual_names(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "id,sentence1,sentence2,score\n1,one,two,4.5\n2,three,four,0\n")
    assert read_samples(path, "feature-extraction") == [
        Sample(text="one", text_pair="two", label=4.5),
        Sample(text="three", text_pair="four", label=0.0),
    ]
    path = write(tmp_path, "b.tsv", "text\tlabel\nfine\tgood\n")
    assert read_samples(path, "text-classification") == [Sample(text="fine", label="good")]


def test_columns_by_name_and_by_number(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "body,sentence2,mark\nx,y,1\n")
    columns = {"text": "sentence2", "label": "mark"}
    assert read_samples(path, "text-classification", columns) == [Sample(text="y", label="1")]
    path = write(tmp_path, "b.csv", 'one,two,3\n"three, and more",four,5\n')
    found = read_samples(path, "feature-extraction", {"text": 0, "text_pair": 1, "label": 2})
    assert found[1] == Sample(text="three, and more", text_pair="four", label=5.0)


def test_texts_arrive_as_they_are(tmp_path: Path) -> None:
    """Separators of lines that only Unicode knows are characters; so are quotes in tsv, and line ends in quotes."""
    text = "one\u2028two\x85three"
    path = write(tmp_path, "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\r\n\n")
    assert read_samples(path, "text-classification") == [Sample(text=text)]
    path = write(tmp_path, "b.csv", f'text,label\r\n{text},x\r\n"two\nlines, ""quoted""",y\r\n')
    assert [sample.text for sample in read_samples(path, "text-classification")] == [text, 'two\nlines, "quoted"']
    path = write(tmp_path, "c.tsv", '\ufefftext\tlabel\n"open\t0\n"Hello," she said\t1\nclose"\t1\n')
    found = read_samples(path, "text-classification")
    assert [sample.text for sample in found] == ['"open', '"Hello," she said', 'close"']


def test_a_text_may_be_a_whole_document(tmp_path: Path) -> None:
    long = "the cat sat. " * 20_000
    path = write(tmp_path, "a.csv", f"text\n{long}\n")
    assert read_samples(path, "fill-mask") == [Sample(text=long)]


def test_names_of_files_end_in_small_or_capital_letters(tmp_path: Path) -> None:
    path = write(tmp_path, "TRAIN.CSV", "my text, label\na fine film,1\n")
    assert read_labelled(path, None, {"text": "my text"}) == [Sample(text="a fine film", label="1")]
    path = write(tmp_path, "B.TSV", "text\tlabel\na, b\t1\n")
    assert read_samples(path, "text-classification") == [Sample(text="a, b", label="1")]
    assert read_samples(write(tmp_path, "C.JSONL", '{"text": "x"}'), "fill-mask") == [Sample(text="x")]
    assert read_samples(write(tmp_path, "D.TXT", "x"), "fill-mask") == [Sample(text="x")]


def test_questions_in_both_forms(tmp_path: Path) -> None:
    lines = [
        {"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
        {"question": "q", "context": "c", "answers": ["a"]},
        {"question": "q", "context": "c", "answers": "a"},
    ]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert [sample.label for sample in read_samples(path, "question-answering")] == [["a", "b"], ["a"], ["a"]]


def test_tokens_and_tags(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"tokens": ["Ada", "sang"], "tags": ["B-PER", "O"]}\n')
    assert read_samples(path, "token-classification") == [
        Sample(text="Ada sang", label=(["Ada", "sang"], ["B-PER", "O"]))
    ]


def test_lines_of_plain_text_are_samples_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufeffthe cat\r\n\n  a\u2028dog, ran \n".encode())
    lines = [Sample(text="the cat"), Sample(text="  a\u2028dog, ran ")]
    for task in ("feature-extraction", "text-classification", "token-classification", "fill-mask"):
        assert read_samples(path, task) == lines
    assert [sample.text for sample in read_samples(path, "text-generation")] == ["the cat\r\n\n  a\u2028dog, ran \n"]


CONLL = "-DOCSTART- -X- -X- O\n\nAda NNP I-NP B-PER\nsang VBD I-VP O\n\n\nRome NNP I-NP B-LOC"


@pytest.mark.parametrize("name", ["a.conll", "eng.testa", "b.txt"])
def test_columns_of_tokens_and_tags_are_read_alike_to_train_and_to_judge(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, CONLL)
    found = read_samples(path, "token-classification")
    assert found == [
        Sample(text="Ada sang", label=(["Ada", "sang"], ["B-PER", "O"])),
        Sample(text="Rome", label=(["Rome"], ["B-LOC"])),
    ]
    assert read_labelled(path, "token-classification") == found


def test_lines_of_a_label_and_a_text_judge_as_they_teach(tmp_path: Path) -> None:
    path = tmp_path / "stsa.binary.dev"
    path.write_text("1 a fine film\n\n0\ta bore\n")
    found = read_samples(path, "text-classification")
    assert found == [Sample(text="a fine film", label="1"), Sample(text="a bore", label="0")]
    assert read_labelled(path, None) == found


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("a.xml", "x", "fill-mask", r"a\.xml: files of samples end in \.csv, \.tsv, \.jsonl or \.txt"),
        ("a.conll", "x O\n", "fill-mask", r"a\.conll: files of samples end in"),
        ("a.dev", "1 fine\n0\n", "text-classification", "line 2 has a label and no text"),
        ("a.json", '[{"text": "a fine film", "label": 1}]', "text-classification", r"\.jsonl is read, an object a line"),
        ("a.txt", " \n\n", "fill-mask", "holds no samples"),
        ("a.txt", b"\xff\xfe", "fill-mask", r"a\.txt cannot be read as UTF-8 text"),
        ("a.txt", "who?\n", "question-answering", "questions need a context"),
        ("a.conll", "Ada B-PER\n\nsang\n", "token-classification", "line 3: a token and, last, its tag"),
        ("a.txt", "Ada B-PER\nsang X\n", "token-classification", "line 2: a token and, last, its tag"),
        ("a.conll", "\n", "token-classification", "holds no samples"),
        ("a.csv", b"text\nab\n\xff\xfe\n", "fill-mask", r"a\.csv cannot be .* line 3 holds the byte 0xff .* in UTF-8"),
        ("a.csv", "", "fill-mask", "holds no samples"),
        ("a.csv", "text,label\n", "fill-mask", "holds no samples"),
        ("a.jsonl", "\n\n", "fill-mask", "holds no samples"),
        ("a.csv", "body,label\nx,y\n", "text-classification", "no column of texts; it has: body, label.*--column text="),
        ("a.csv", "text,label\nx,y\nz\n", "text-classification", "line 3 has 1 columns; the header has 2.*by commas, and"),
        ("a.csv", "text;label\nx;y\n", "text-classification", "header 'text;label': columns of .csv are parted by commas"),
        ("a.tsv", "text\tlabel\nx\ty\nz\n", "text-classification", "line 3 has 1 columns; the header has 2.*by tabs"),
        ("a.csv", "text,text\nx,y\n", "text-classification", "names the column 'text' twice"),
        ("a.csv", 'text,label\n"open,y\nz,y\n', "text-classification", "line 3: .*its own quotes doubled"),
        ("a.csv", "text,label\nx,y\n ,y\n", "text-classification", "line 3: the text is empty"),
        ("a.csv", "text,label\nx,y\nz,\n", "text-classification", "line 3: the label is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "fill-mask", r"line 2 is not valid JSON"),
        ("a.jsonl", '["x"]\n', "fill-mask", "line 1 is a list; an object"),
        ("a.jsonl", '{"text": 3}\n', "fill-mask", "line 1: the text is empty or no text"),
        ("a.jsonl", '{"text": "x", "label": 1}\n\n{"text": "y"}\n', "text-classification", "line 3 has no label"),
        ("a.csv", "text,score\nx,1\n", "feature-extraction", "need two texts a row"),
        ("a.csv", "sentence1,sentence2,score\na,b,many\n", "feature-extraction", "line 2: The score 'many' is no"),
        ("a.csv", "sentence1,sentence2,score\na,b,nan\n", "feature-extraction", "line 2: The score 'nan' is no"),
        ("a.csv", "question,answer\nq,a\n", "question-answering", "questions need a context"),
        ("a.jsonl", '{"question":"q","context":"c","answers":[]}', "question-answering", "line 1: answers are a text or"),
        ("a.csv", "text,label\nAda,B-PER\n", "token-classification", "line 2: labels of tokens come as lists"),
        ("a.jsonl", '{"tokens":["a","b"],"tags":["O"]}', "token-classification", "line 1: tokens and tags are lists of"),
        ("a.jsonl", '{"tokens":["a",""],"tags":["O","O"]}', "token-classification", "line 1: tokens are texts"),
        ("a.jsonl", '{"tokens":["a"],"tags":[3]}', "token-classification", "line 1: the tag 3 is not in BIO form"),
        ("a.jsonl", '{"tokens":["a"],"tags":["PER"]}', "token-classification", "the tag 'PER' is not in BIO form"),
    ],
)  # fmt: skip
def test_reading_errors_name_file_and_line(
    name: str, content: str | bytes, task: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        read_samples(write(tmp_path, name, content), task)
    assert name in str(caught.value)


def test_a_missing_file_and_missing_columns(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        read_samples(tmp_path / "none.csv", "fill-mask")
    path = write(tmp_path, "a.csv", "text,label\nx,y\n")
    with pytest.raises(RecipeError, match="line 2 has no column 'body'; it has: text, label"):
        read_samples(path, "text-classification", {"text": "body"})
    with pytest.raises(RecipeError, match="line 1 has no column 4; it has: 0, 1"):
        read_samples(path, "text-classification", {"text": 4})
    with pytest.raises(RecipeError, match="Columns were given for 'body'; the roles are: text, text_pair, label"):
        read_samples(path, "text-classification", {"body": "text"})

"""From bytes to records: formats, chunk borders, and what is said of input that is none."""

import json

import pytest

import dbtool

A, B = {"a": 1}, {"b": [1, {"c": "x\ny é😀"}], "d": -1.5e-3}


def parse(data, size=None, **options):
    size = size or len(data) or 1
    return list(dbtool.records((data[i:i + size] for i in range(0, len(data), size)), **options))


@pytest.mark.parametrize("text", [
    "{a}", " \n{a}\r\n", "{a}{b}", "{a}\n{b}\n", "{a} {b}", "{a}\r\n\r\n{b}", "[{a}, {b}]", "[\n{a}\n,\n{b}\n]\n",
    "[{a}][{b}]", "[]", "[]{a}", "{pretty}", "{pretty}\n{pretty}{a}", "[{pretty},{pretty}]"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
@pytest.mark.parametrize("ascii", [True, False], ids=["ascii", "utf8"])
def test_records_formats(text, size, ascii):
    names = {"{a}": A, "{b}": B, "{pretty}": B}
    expected = [names[f"{{{part.split('}')[0]}}}"] for part in text.split("{")[1:]]
    for name, value in names.items():
        text = text.replace(name, json.dumps(value, ensure_ascii=ascii, indent=4 if name == "{pretty}" else None))
    assert parse(text.encode(), size) == expected


BAD = [
    (b"", "no JSON on standard input: did the program before the pipe fail?"),
    (b" \n ", "no JSON on standard input: did the program before the pipe fail?"),
    (b"hello", "record 1 (line 1): expected a JSON object, got"),
    (b'{"a": 1}\nhello', "record 2 (line 2): expected a JSON object, got"),
    (b"1", "record 1 (line 1): expected a JSON object, got"),
    (b"[1]", "record 1 (line 1): expected a JSON object, got"),
    (b'[{"a": 1} {"a": 2}]', "record 2 (line 1): expected a JSON object, got"),
    (b'[{"a": 1},]', "record 2 (line 1): expected a JSON object, got"),
    (b'{"a": 1},{"a": 2}', "record 2 (line 1): expected a JSON object, got"),
    (b'{"a": 1}]', "record 2 (line 1): expected a JSON object, got"),
    (b'[{"a": 1}', "record 2 (line 1): not valid JSON: the array does not end"),
    (b'{"a": 1}\n\n{"a": 1', "record 2 (line 3): not valid JSON: it ends in the middle; was the program"),
    (b'{"a": "xyz', "record 1 (line 1): not valid JSON: it ends in the middle"),
    (b'{"a": 1}\n{"a": tru, "long enough": "to be no end"}', "record 2 (line 2): not valid JSON: expecting value"),
    (b"{'a': 1, 'bbbbbbbbbbbbbbbbbbbbbbbbbbb': 2}", "record 1 (line 1): not valid JSON: expecting property name"),
    (b'{"a": "line\nbreak in it, which is not allowed"}', "record 1 (line"),
    (b'{"a": 1}\n{"a": "\xff"}\n{"a": 2}', "record 2 (line 2): byte 0xff is not UTF-8"),
    (b'{"a": 1}\n\xc3', "record 2 (line 2): byte 0xc3 is not UTF-8"),
    ('{"a": "é"}'.encode("utf-16"), "record 1 (line 1): byte 0xff is not UTF-8"),
    (b'{"a": ' + b"[" * 100_000, "record 1 (line 1): not valid JSON: it is nested too deeply"),
    (b'{"a": 1e999, "b": 1}', "record 1 (line 1): not valid JSON: the number 1e999 is too large"),
    (b'{"limit": 1, "limit": 2}', 'record 1 (line 1): not valid JSON: the key "limit" stands in one object twice'),
    (b'{"a": 1, "b": 2, "a": 3}', 'record 1 (line 1): not valid JSON: the key "a" stands in one object twice'),
]


@pytest.mark.parametrize(("data", "said"), BAD, ids=[repr(data[:20]) for data, _ in BAD])
@pytest.mark.parametrize("size", [1, 5, None])
def test_records_refused(data, said, size):
    if size and len(data) > 10_000:
        size *= 1000
    with pytest.raises(dbtool.Failure) as info:
        parse(data, size)
    assert str(info.value).startswith(said)
    assert "\n" not in str(info.value) and info.value.status == 1


def test_records_before_the_bad_one_come_out():
    got = []
    with pytest.raises(dbtool.Failure, match=r"record 3 \(line 3\)"):
        for record in dbtool.records([b'{"a": 1}\n{"a": 2}\n{"a": \xff}\n']):
            got.append(record)
    assert got == [{"a": 1}, {"a": 2}]


def test_integer_of_ten_thousand_digits():
    try:
        (record,) = parse(b'{"a": 1' + b"0" * 10_000 + b"}")
    except dbtool.Failure as failure:
        assert "an integer of thousands of digits" in str(failure)
    else:
        assert record["a"] == 10**10_000  # a Python without that limit: fit() refuses it later


@pytest.mark.parametrize("size", [1, 3, 50, None])
def test_skip_text(size):
    data = ('loading\n  50% [====>   ]\n[INFO] epoch 1\n{"a": 1}\nloss: 0.5\r50%\r100%\r{"a":\n 2}\n\n'
            '  {"a": 3} {"a": 4}\nend').encode()
    shown = []
    assert parse(data, size, skip_text=True, echo=shown.append) == [{"a": n} for n in (1, 2, 3, 4)]
    assert "".join(shown).split("\n") == [
        "loading", "  50% [====>   ]", "[INFO] epoch 1", "loss: 0.5", "50%", "100%", "end", ""]


@pytest.mark.parametrize("size", [1, 3, None])
def test_skip_text_passes_text_on_that_is_not_utf8(size):
    shown = []
    assert parse(b'donn\xe9es\n{"a": "\xc3\xa9"}\n\xff', size, skip_text=True, echo=shown.append) == [{"a": "é"}]
    assert shown == ["donn\udce9es\n", "\udcff\n"]


@pytest.mark.parametrize(("data", "said"), [
    (b'{"loss": 0.5,}\n', "record 1 (line 1): not valid JSON"),
    (b'{ \n"loss": oops', "record 1 (line 2): not valid JSON"),
    (b"{'loss': 0.5}\n{ loss }\n", "no JSON object on standard input, only text"),
    (b'{"a": 1} and more\n', "record 2 (line 1): expected a JSON object"),
    (b'{"a": 1} [{"a": 2}\n{"a": 3}]\n', "record 3 (line 2): expected a JSON object"),
    (b"only text\n", "no JSON object on standard input"),
    (b"", "no JSON on standard input"),
])
def test_skip_text_refused(data, said):
    with pytest.raises(dbtool.Failure) as info:
        parse(data, skip_text=True)
    assert str(info.value).startswith(said)


def test_long_record_in_small_chunks_takes_linear_time():
    import time

    record = {"a": "x" * 1_000_000, "b": list(range(100_000))}
    data = json.dumps(record).encode()
    start = time.perf_counter()
    assert parse(data, 4096) == [record]
    assert time.perf_counter() - start < 5

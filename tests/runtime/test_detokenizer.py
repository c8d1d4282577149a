"""Text token by token: no half characters, nothing lost, and stop strings that come in pieces."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_decoders import save_byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from onnxpress.runtime.detokenizer import Detokenizer, StopStrings


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "text", ["the end", "héllo wörld", "你好,世界", "👩‍👩‍👧 family 🇫🇷!", "a\n\n b\t c", "  two  spaces  "]
)
def test_pieces_are_whole_characters_and_add_up(inner: Any, text: str) -> None:
    detokenizer = Detokenizer(inner)
    pieces = [detokenizer.push(token) for token in inner.encode(text).ids]
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text
    assert len([piece for piece in pieces if piece]) > 1  # it did come in pieces


def test_half_a_character_at_the_end_is_not_shown(inner: Any) -> None:
    ids = inner.encode("ok 👍").ids[:-1]
    detokenizer = Detokenizer(inner)
    assert "".join(detokenizer.push(token) for token in ids) + detokenizer.flush() == "ok "


def test_bytes_that_never_become_a_character_do_not_swallow_what_follows(inner: Any) -> None:
    lone = inner.encode("é").ids[0]
    detokenizer = Detokenizer(inner)
    text = "".join(detokenizer.push(token) for token in [lone, *inner.encode("abc").ids])
    assert text.endswith("abc")


def test_special_tokens_give_no_text(inner: Any) -> None:
    detokenizer = Detokenizer(inner)
    assert detokenizer.push(0) == ""
    assert detokenizer.push(inner.encode("x").ids[0]) == "x"


def test_a_space_that_hangs_on_the_token_before_is_kept() -> None:
    """SentencePiece-like tokenizers drop the space of a text's first word: an answer's first word follows the prompt's."""
    inner = Tokenizer(models.BPE({"<unk>": 0, "▁Hello": 1, "▁world": 2, "s": 3}, [], unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    assert inner.decode([2]) == "world"
    detokenizer = Detokenizer(inner, prompt=[1])
    assert [detokenizer.push(token) for token in (2, 3)] == [" world", "s"]


@pytest.fixture(scope="module")
def falling_back() -> Any:
    """SentencePiece-like, with bytes for what it has no token for; a run of bytes that is no text as a whole gives none."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    inner = Tokenizer(
        models.BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>")
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return inner


@pytest.mark.parametrize("prompt", ["I love 🦙🦙", "日本😀", "price 5€😀", "é", "ab"])
@pytest.mark.parametrize("answer", ["🦙🦙 hello", "日本語", "ok"])
def test_an_answer_goes_on_after_bytes(falling_back: Any, prompt: str, answer: str) -> None:
    detokenizer = Detokenizer(falling_back, falling_back.encode(prompt).ids)
    pieces = [detokenizer.push(token) for token in falling_back.encode(answer).ids]
    assert "".join(pieces) + detokenizer.flush() == answer


def test_what_a_prompt_ends_with_is_no_part_of_the_answer(falling_back: Any, inner: Any) -> None:
    for tokenizer in (falling_back, inner):
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("the bad \ufffd").ids)
        assert "".join(map(detokenizer.push, tokenizer.encode(" cat").ids)) == " cat"


@pytest.mark.parametrize("prompt", ["caf\ufffd?", "a\ufffd.", "the bad \ufffd"])
@pytest.mark.parametrize("answer", ["", "ð"])
def test_an_answer_of_nothing_is_nothing(prompt: str, answer: str) -> None:
    """Behind a vocabulary that has the replacement character as one token, as large ones have. "ð" is the first byte of an emoji."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {piece: number for number, piece in enumerate([*letters, "ï¿", "ï¿½"])}
    inner = Tokenizer(models.BPE(known, [("ï", "¿"), ("ï¿", "½")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    detokenizer = Detokenizer(inner, inner.encode(prompt).ids)
    assert "".join(detokenizer.push(inner.token_to_id(piece)) for piece in answer) + detokenizer.flush() == ""


def test_half_a_character_may_be_all_of_a_prompt_or_come_after_broken_bytes(inner: Any) -> None:
    first, second = inner.encode("é").ids
    for prompt in ([first], [*inner.encode("a b").ids, first, *inner.encode("cd").ids, first]):
        detokenizer = Detokenizer(inner, prompt)
        assert "".join(map(detokenizer.push, [second, *inner.encode("cat").ids])) == "écat"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_answer_ends_a_character_that_its_prompt_began(falling_back: Any, inner: Any, cut: int) -> None:
    for tokenizer in (falling_back, inner):
        ids = tokenizer.encode("hi there 😀 yes").ids
        half = ids.index(tokenizer.encode("😀").ids[0]) + cut
        detokenizer = Detokenizer(tokenizer, ids[:half])
        assert "".join(map(detokenizer.push, ids[half:])) + detokenizer.flush() == "😀 yes"


def test_stop_strings_are_held_back_and_cut() -> None:
    stops = StopStrings(["END", "\n\n"])
    assert [stops.push(piece) for piece in ["ab", "cE", "N", "xy", "\n", "E", "ND more"]] == ["ab", "c", "", "ENxy", "", "\n", ""]  # fmt: skip
    assert stops.found == "END"
    assert stops.push("nothing after it") == ""


def test_the_first_of_several_stop_strings_counts() -> None:
    stops = StopStrings(["later", "now"])
    assert stops.push("right now, not later") == "right "
    assert stops.found == "now"


def test_what_was_held_back_comes_at_the_end() -> None:
    stops = StopStrings(["STOP"])
    assert stops.push("a ST") == "a "
    assert stops.flush() == "ST"

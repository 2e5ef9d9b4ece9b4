"""Captions: the forms one is trained in."""

from lorakit import captions


def test_one_form_where_nothing_is_varied():
    assert captions.variants("a, b, c", 8) == ("a, b, c",)
    assert captions.variants("a", 8, shuffle=True) == ("a",)
    assert captions.variants("a, b", 8, shuffle=True, keep_tokens=2, tag_dropout=0.5) == ("a, b",)


def test_shuffling_keeps_every_tag_and_the_first_in_place():
    forms = captions.variants("sks, red, big, round, old", 16, shuffle=True, keep_tokens=1)
    assert len(forms) == 16 and len(set(forms)) > 8
    for form in forms:
        assert form.startswith("sks, ")
        assert sorted(captions.tags(form)) == sorted(["sks", "red", "big", "round", "old"])


def test_dropout_drops_about_its_share_and_keeps_the_order():
    forms = captions.variants("sks, a, b, c, d", 400, keep_tokens=1, tag_dropout=0.25)
    left = [captions.tags(form)[1:] for form in forms]
    assert 0.2 < 1 - sum(map(len, left)) / 1600 < 0.3
    assert all(tags == sorted(tags) for tags in left)


def test_chance_depends_on_seed_and_words_alone():
    first = captions.variants("a, b, c, d", 8, shuffle=True, seed=1)
    assert first == captions.variants("a, b, c, d", 8, shuffle=True, seed=1)
    assert first != captions.variants("a, b, c, d", 8, shuffle=True, seed=2)


def test_the_class_takes_the_triggers_place():
    assert captions.without_trigger("a photo of sks cat, red", "sks cat", "cat") == "a photo of cat, red"

"""Small spaCy pipelines made here stand for the published ones: rules that look at neighbors, a lemma table, a parse table."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from spacy.language import Language
from spacy.lookups import Lookups
from spacy.training import Example
from torch.utils.data import DataLoader

from lavender.batches.collator import Collator
from lavender.batches.word_selection import WordSelector
from lavender.config import WordsConfig
from lavender.data.samples import Conversation, Message
from lavender.errors import ConfigError
from lavender.types import Word
from lavender.words import Caption, match_words, words_of

LEMMAS = {"dogs": "dog", "sat": "sit", "sits": "sit", "mice": "mouse", "Mice": "mouse", "does": "do", "n't": "not"}
# Parses as spaCy writes them: per token its head and its label, by ClearNLP or by Universal Dependencies.
PARSES = {
    "A cat and a dog gave her balls on the red mat": {
        "clear": "1 det, 5 nsubj, 1 cc, 4 det, 1 conj, 5 ROOT, 5 dative, 5 dobj, 5 prep, 11 det, 11 amod, 8 pobj",
        "universal": "1 det, 5 nsubj, 4 cc, 4 det, 1 conj, 5 ROOT, 5 iobj, 5 obj, 11 case, 11 det, 11 amod, 5 obl",
    },
    "The ball was seen by dogs of Ann last year": {
        "clear": "1 det, 3 nsubjpass, 3 auxpass, 3 ROOT, 3 agent, 4 pobj, 5 prep, 6 pobj, 9 amod, 3 npadvmod",
        "universal": "1 det, 3 nsubj:pass, 3 aux:pass, 3 ROOT, 5 case, 3 obl:agent, 7 case, 5 nmod, 9 amod, 3 obl:tmod",
    },
    "Ann 's cat sits and eats": {
        "clear": "2 poss, 0 case, 3 nsubj, 3 ROOT, 3 cc, 3 conj",
        "universal": "2 nmod:poss, 0 case, 3 nsubj, 3 ROOT, 5 cc, 3 conj",
    },
}


@Language.factory("parses_of_the_test", assigns=["token.dep", "token.head"], default_config={"labels": "clear"})
def make_parser(nlp, name, labels):
    def parse(doc):
        for token, own in zip(doc, PARSES[doc.text][labels].split(", "), strict=True):
            head, label = own.split()
            token.head, token.dep_ = doc[int(head)], label
        return doc

    return parse


@pytest.fixture(scope="session")
def tagger(tmp_path_factory):
    """Folder of a pipeline whose rules need the sentence: what stands before "ball" or "cat" describes it."""
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    colors, things = {"LOWER": {"IN": ["orange", "rose"]}}, {"LOWER": {"IN": ["ball", "cat", "mat"]}}
    ruler.add([[colors], [things]], {"POS": "NOUN"})
    ruler.add([[colors, things]], {"POS": "ADJ"}, 0)
    ruler.add([[{"LOWER": "sits"}]], {"POS": "VERB"})
    ruler.add([[{"LOWER": {"IN": ["is", "does"]}}]], {"POS": "AUX"})
    ruler.add([[{"LOWER": "well"}]], {"POS": "ADV"})
    ruler.add([[{"LOWER": "known"}]], {"POS": "ADJ"})
    ruler.add([[{"TEXT": "Ann"}]], {"POS": "PROPN"})
    lookups = Lookups()
    lookups.add_table("lemma_lookup", LEMMAS)
    nlp.add_pipe("lemmatizer", config={"mode": "lookup"}).initialize(lookups=lookups)
    folder = tmp_path_factory.mktemp("tagger") / "pipeline"
    nlp.to_disk(folder)
    return str(folder)


@pytest.fixture(scope="session")
def selector(tagger):
    """One for all examples, as a run has it."""
    return WordSelector(WordsConfig(match="root", parts_of_speech=("noun",), tagger=tagger))


@pytest.fixture(scope="session", params=["clear", "universal"])
def parser(request, tmp_path_factory):
    """Folder of a pipeline that knows `PARSES` alone."""
    nlp = spacy.blank("en")
    nlp.add_pipe("parses_of_the_test", config={"labels": request.param})
    folder = tmp_path_factory.mktemp("parser") / "pipeline"
    nlp.to_disk(folder)
    return str(folder)


def kept(selector, answer):
    words = words_of(answer)
    return [word.text for word, flag in zip(words, selector.selected(answer, words), strict=True) if flag]


def found(selector, caption, answer):
    """Where each word of the answer begins in the caption."""
    words = words_of(answer)
    return {
        word.text: [own.start for own in same]
        for word, same in zip(words, selector.occurrences(Caption.of(caption), answer, words), strict=True)
    }


def test_a_word_is_tagged_in_its_sentence(tagger):
    answer = "The orange cat sits by an Orange, a rose ball is by a rose"
    assert kept(WordSelector(WordsConfig(parts_of_speech=("adjective",), tagger=tagger)), answer) == ["orange", "rose"]
    nouns = WordSelector(WordsConfig(parts_of_speech=("noun",), tagger=tagger))
    flags = nouns.selected(answer, words_of(answer))
    assert [word.start for word, flag in zip(words_of(answer), flags, strict=True) if flag] == [11, 26, 41, 54]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("noun",), ["Ann", "cat's", "ball"]),
        (("verb",), ["sits"]),  # an auxiliary is none
        (("adjective",), ["well-known"]),  # any of a word's tokens counts
        (("noun", "verb"), ["Ann", "cat's", "sits", "ball"]),
        ((), ["Ann", "is", "well-known", "her", "cat's", "sits", "on", "the", "ball"]),
    ],
)
def test_parts_of_speech(tagger, parts, expected):
    answer = "Ann is well-known; her cat's sits on the ball"
    selector = WordSelector(WordsConfig(parts_of_speech=parts, tagger=tagger))
    assert kept(selector, answer) == expected


@pytest.mark.parametrize(
    ("answer", "subjects", "objects"),
    [
        ("A cat and a dog gave her balls on the red mat", ["cat", "dog"], ["her", "balls", "mat"]),
        ("The ball was seen by dogs of Ann last year", ["ball"], ["dogs", "Ann"]),
        ("Ann 's cat sits and eats", ["cat"], []),
    ],
)
def test_subjects_and_objects_by_both_sets_of_labels(parser, answer, subjects, objects):
    assert kept(WordSelector(WordsConfig(parts_of_speech=("subject",), tagger=parser)), answer) == subjects
    assert kept(WordSelector(WordsConfig(parts_of_speech=("object",), tagger=parser)), answer) == objects
    both = kept(WordSelector(WordsConfig(parts_of_speech=("object", "subject"), tagger=parser)), answer)
    assert both == [word.text for word in words_of(answer) if word.text in subjects + objects]


def test_excluded_words_are_left_out_whatever_their_case_and_composition(tagger):
    answer = "The CAFE\u0301 and the cat, a Straße, cats"
    config = WordsConfig(exclude=("Cat", "caf\u00e9", "STRASSE"))
    assert kept(WordSelector(config), answer) == ["The", "and", "the", "a", "cats"]
    config = WordsConfig(exclude=("cat",), parts_of_speech=("noun",), tagger=tagger)
    assert kept(WordSelector(config), "a cat, a ball") == ["ball"]


def test_exact_takes_the_very_letters_in_any_composition():
    selector = WordSelector(WordsConfig(match="exact"))
    assert found(selector, "Cat cat cats", "cat Dog") == {"cat": [4], "Dog": []}
    assert found(selector, "caf\u00e9 Cafe\u0301 cafe\u0301 cafe", "cafe\u0301") == {"cafe\u0301": [0, 11]}
    assert found(selector, "Straße STRASSE", "Straße") == {"Straße": [0]}
    assert found(selector, "一只红色的猫坐着，猫。", "猫 红色的猫") == {"猫": [5, 9], "红色的猫": [2]}
    assert found(selector, "猫のTシャツとtシャツ", "t") == {"t": [7]}


def test_casefold_is_match_words():
    selector = WordSelector(WordsConfig())
    assert found(selector, "Cat cat cats", "cat CATS") == {"cat": [0, 4], "CATS": [8]}
    assert found(selector, "一只红色的猫", "猫") == {"猫": [5]}


def test_root_takes_words_of_one_lemma(tagger):
    selector = WordSelector(WordsConfig(match="root", tagger=tagger))
    assert found(selector, "Two dogs sat, a Dog", "The dog sits by dogs") == {
        "The": [],
        "dog": [4, 16],
        "sits": [9],
        "by": [],
        "dogs": [4, 16],
    }
    assert found(selector, "Mice", "a mouse") == {"a": [], "mouse": [0]}
    # All of a word's tokens count: "don't" is do + n't, and a hyphenated word is three.
    assert found(selector, "it doesn't, it does", "do don't not") == {"do": [15], "don't": [3], "not": []}
    assert found(selector, "dogs-mice, 3.5 dog", "dog-mouse 3.5") == {"dog-mouse": [0], "3.5": [11]}
    # spaCy makes one token of "dog|cat": its lemma is neither word's.
    assert found(selector, "dog|cat", "dog|cat") == {"dog": [0], "cat": [4]}
    assert found(selector, "一只红色的猫", "猫") == {"猫": [5]}


def test_a_text_without_lemmas_is_compared_by_its_letters(tmp_path):
    """Components may leave words without a lemma: these must not all be the same."""
    nlp = spacy.blank("en")
    nlp.add_pipe("attribute_ruler").add([[{"LOWER": "dogs"}]], {"LEMMA": "dog"})
    nlp.to_disk(tmp_path / "p")
    selector = WordSelector(WordsConfig(match="root", tagger=str(tmp_path / "p")))
    assert found(selector, "a cat, Dog, dogs", "cat dog") == {"cat": [2], "dog": [7, 12]}


# Letters of the kinds that differ, and words that have lemmas.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            [*LEMMAS, "dog", "Dogs", "DOG", "do", "don't", "cafe\u0301", "caf\u00e9", "CAFÉ", "猫", "红色的猫", "-", "|"]
        ),
        st.text(st.one_of(st.sampled_from("aAé'’-_ \u0301\u200d猫ßﬁ"), st.characters(codec="utf-8")), max_size=4),
    ),
    max_size=6,
).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(caption=texts, answer=texts)
def test_each_match_contains_the_stricter_one(selector, caption, answer):
    words = words_of(answer)
    exact, casefold = (
        WordSelector(WordsConfig(match=match)).occurrences(Caption.of(caption), answer, words) for match in ("exact", "casefold")
    )
    root = selector.occurrences(Caption.of(caption), answer, words)
    assert casefold == match_words(caption, [word.text for word in words])
    for narrow, wide in ((exact, casefold), (casefold, root)):
        assert len(narrow) == len(wide) == len(words)
        assert all(set(a) <= set(b) for a, b in zip(narrow, wide, strict=True))
    for same in root:
        assert [own.start for own in same] == sorted(own.start for own in same)
        assert all(caption[own.start : own.end] == own.text for own in same)
        assert len(set(same)) == len(same)


@settings(max_examples=100, deadline=None)
@given(answer=texts)
def test_every_word_has_a_flag_and_matches_itself(selector, answer):
    words = words_of(answer)
    flags = selector.selected(answer, words)
    assert len(flags) == len(words)
    assert all(isinstance(flag, bool) for flag in flags)
    for config in (WordsConfig(), WordsConfig(match="exact")):
        plain = WordSelector(config)
        assert plain.selected(answer, words) == [True] * len(words)
        assert all(word in same for word, same in zip(words, plain.occurrences(Caption.of(answer), answer, words), strict=True))


def test_dense_maps_reach_half_of_their_range_in_enough_places():
    maps = np.zeros((5, 4, 5), np.float32)
    maps[0, 0, 0] = 1  # 1 of 20 places
    maps[1, :, :2] = [7, 8]  # 8 of 20
    maps[2, 0, :4] = [4, 2, 1.9, 2]  # 3 of 20
    maps[3] = 5  # all of them
    maps[4, 0, 0] = np.nan
    for share, expected in ((0.0, 11110), (0.05, 11110), (0.06, 1110), (0.15, 1110), (0.16, 1010), (0.4, 1010), (0.41, 10)):
        dense = WordSelector(WordsConfig(min_coverage=share)).dense(maps)
        assert dense.tolist() == [c == "1" for c in f"{expected:05d}"], share
    # A range that does not begin at zero, and no map at all.
    assert WordSelector(WordsConfig(min_coverage=0.5)).dense(np.array([[[-4.0, -1, 0, 2]], [[-4.0, -2, -3, 2]]])).tolist() == [
        True,
        False,
    ]
    assert WordSelector(WordsConfig(min_coverage=0.5)).dense(np.zeros((0, 4, 4))).shape == (0,)


def test_a_text_is_tagged_once(tagger, monkeypatch):
    selector = WordSelector(WordsConfig(match="root", parts_of_speech=("noun",), tagger=tagger))
    tagged = []
    original = Language.__call__
    monkeypatch.setattr(Language, "__call__", lambda nlp, text, **more: tagged.append(text) or original(nlp, text, **more))
    for _ in range(2):
        for answer in ("a cat", "the ball"):
            selector.selected(answer, words_of(answer))
            selector.occurrences(Caption.of("dogs"), answer, words_of(answer))
    assert tagged == ["a cat", "dogs", "the ball"]


class Collate:
    """What a collator does with a selector, for a worker process."""

    def __init__(self, selector):
        self.selector = selector

    def __call__(self, answers):
        return [self.selector.selected(answer, words_of(answer)) for answer in answers]


def test_a_selector_works_in_other_processes(tagger):
    selector = WordSelector(WordsConfig(match="root", parts_of_speech=("noun",), tagger=tagger))
    answers = ["an orange cat", "an orange", "dogs"]
    expected = [[False, False, True], [False, True], [False]]
    assert Collate(selector)(answers) == expected
    copied = pickle.dumps(selector)
    assert len(copied) < 2000  # the pipeline's name and the settings, no weights
    assert Collate(pickle.loads(copied))(answers) == expected
    loader = DataLoader(answers, batch_size=3, num_workers=1, collate_fn=Collate(selector), multiprocessing_context="spawn")
    assert list(loader) == [expected]


def test_a_missing_spacy_or_pipeline_is_a_users_mistake(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"'xx_none_sm'.*python -m spacy download xx_none_sm"):
        WordSelector(WordsConfig(tagger="xx_none_sm"))
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=r"cannot load .*; give a folder that nlp.to_disk wrote"):
            WordSelector(WordsConfig(tagger=str(folder)))
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"needs spaCy.*pip install 'lavender-attention\[words\]'"):
        WordSelector(WordsConfig(tagger="en_core_web_sm"))


def test_a_pipeline_must_set_what_the_config_needs(tagger, parser, tmp_path):
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    nlp.add_pipe("attribute_ruler").add([[{"LOWER": "a"}]], {"TAG": "DT"})
    nlp.to_disk(tmp_path / "p")
    for folder, config, message in (
        (tmp_path / "p", {"match": "root"}, r"match='root' needs .* token\.lemma; .*sentencizer, attribute_ruler"),
        (tmp_path / "p", {"parts_of_speech": ("noun",)}, r"parts_of_speech='noun' needs .* token\.pos"),
        (parser, {"parts_of_speech": ("subject", "verb")}, r"parts_of_speech='verb' needs .* token\.pos"),
        (parser, {"match": "root"}, r"token\.lemma"),
        (tagger, {"parts_of_speech": ("noun", "object")}, r"parts_of_speech='object' needs .* token\.dep"),
    ):
        with pytest.raises(ConfigError, match=message):
            WordSelector(WordsConfig(tagger=str(folder), **config))


def test_trained_components_set_what_they_say(tmp_path):
    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer")
    nlp.add_pipe("parser", config={"min_action_freq": 1})
    nlp.add_pipe("trainable_lemmatizer", config={"min_tree_freq": 1})
    gold = {"heads": [1, 1, 1], "deps": ["nsubj", "ROOT", "punct"], "pos": ["NOUN", "VERB", "PUNCT"], "lemmas": ["dog", "run", "."]}
    examples = [Example.from_dict(nlp.make_doc("Dogs run."), gold)]
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(40):
        nlp.update(examples, sgd=optimizer)
    nlp.to_disk(tmp_path / "p")
    config = WordsConfig(match="root", parts_of_speech=("subject", "noun"), tagger=str(tmp_path / "p"))
    selector = WordSelector(config)
    assert kept(selector, "Dogs run.") == ["Dogs"]
    assert selector.occurrences(Caption.of("dog"), "Dogs run.", [Word("Dogs", 0, 4)]) == [[Word("dog", 0, 3)]]


def test_a_tagger_reads_each_message_whole(processor, tagger):
    """A question without its pictures, an answer without its thinking: "orange" is a noun where it describes nothing."""
    picture = Image.new("RGB", (64, 64), "red")
    messages = [
        Message("user", "<image>\nAn orange cat on an orange?"),
        Message("assistant", "<think>\nHm.\n</think>\n\nA rose ball."),
    ]
    conversation = Conversation("x", (picture,), tuple(messages))
    nouns = WordsConfig(roles=("question", "answer"), parts_of_speech=("noun",), tagger=tagger)
    collator = Collator(processor, words=nouns)
    words = [word.word.text for word in collator.aligned_words(conversation)]
    assert words == ["orange", "cat", "orange", "rose", "ball"]
    assert collator([conversation])["lavender_present"].tolist() == [[False, True, True, False, True]]
    texts = []
    collator._selector._tokens, tokens = (lambda text: texts.append(text) or tokens(text)), collator._selector._tokens
    collator([conversation])
    assert {*texts} == {"An orange cat on an orange?", "A rose ball."}


def test_importing_and_plain_matching_need_no_spacy():
    code = (
        "import sys; from lavender.batches.word_selection import WordSelector; from lavender.config import WordsConfig;"
        "WordSelector(WordsConfig(match='exact')).selected('a', []); assert 'spacy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

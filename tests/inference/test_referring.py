"""Referring segmentation: equal to the reference's forward per sentence, but with one encoding per image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vpd_fast import VPD, BackboneConfig, VPDConfig
from vpd_fast.errors import InputError
from vpd_fast.inference import make_predictor
from vpd_fast.models.random_weights import randomize


class Encoder:
    """Token features from the sentence's letters, with token names."""

    def embed_sentences(self, sentences: list[str], tokens: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(sum(map(ord, sentence))) for sentence in sentences]
        return torch.stack([torch.randn(tokens, 64, generator=generator) for generator in generators])

    def token_names(self, sentence: str, tokens: int) -> list[str]:
        words = sentence.split()
        return ["<start>", *words, "<end>", *["<pad>"] * (tokens - 2 - len(words))]


class Pieces(Encoder):
    """Tokens are pairs of letters; a sentence that is too long is cut."""

    def _pieces(self, sentence: str) -> list[tuple[str, list[str]]]:
        return [(word, [word[i : i + 2] for i in range(0, len(word), 2)]) for word in sentence.split()]

    def token_names(self, sentence: str, tokens: int) -> list[str]:
        pieces = [piece for _, parts in self._pieces(sentence) for piece in parts][: tokens - 2]
        return ["<start>", *pieces, "<end>", *["<pad>"] * (tokens - 2 - len(pieces))]

    def word_tokens(self, sentence: str, tokens: int) -> list[tuple[str, range]]:
        rows, first = [], 1
        for word, parts in self._pieces(sentence):
            rows.append((word, range(first, min(first + len(parts), tokens - 1))))
            first += len(parts)
        return [(word, row) for word, row in rows if len(row)]

    def sentence_notes(self, sentences: list[str], tokens: int) -> list[str]:
        return [f"{s} is long" for s in sentences if sum(len(parts) for _, parts in self._pieces(s)) > tokens - 2]


@pytest.fixture
def model(tiny_backbone: BackboneConfig) -> VPD:
    return randomize(VPD(VPDConfig(task="referring", tokens=10, base_size=128, backbone=tiny_backbone))).eval()


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference_logits(model: VPD, image: np.ndarray, tokens: torch.Tensor) -> torch.Tensor:
    """refer/test.py: a plain resize of the PIL image to a square, mean and deviation 0.5, a forward per sentence."""
    side = model.config.base_size
    small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    tensor = (torch.from_numpy(small / np.float32(255)).permute(2, 0, 1)[None] - 0.5) / 0.5
    with torch.inference_mode():
        return torch.cat([model(tensor, sentence[None]) for sentence in tokens])


SENTENCES = ["the dog", "the red ball on the left", "a tree"]


def test_at_the_models_size_masks_are_the_references(model: VPD) -> None:
    image, tokens = photo(128, 128), Encoder().embed_sentences(SENTENCES, 10)
    logits = reference_logits(model, image, tokens)
    result = model.predict(image, text=SENTENCES, text_encoder=Encoder(), probabilities=True, batch_size=2)
    decided = ((logits[:, 1] - logits[:, 0]).abs() > 1e-4).numpy()
    np.testing.assert_array_equal(result.masks[decided], logits.argmax(1).bool().numpy()[decided])
    np.testing.assert_allclose(result.probabilities, logits.softmax(1)[:, 1].numpy(), atol=1e-4)
    assert result.sentences == tuple(SENTENCES)
    assert 0 < result.masks.mean() < 1


def test_other_sizes_resize_the_logits_to_the_image(model: VPD) -> None:
    image, tokens = photo(77, 201), Encoder().embed_sentences(SENTENCES[:1], 10)
    logits = torch.nn.functional.interpolate(reference_logits(model, image, tokens), (77, 201), mode="bilinear")
    result = model.predict(image, text=SENTENCES[0], text_encoder=Encoder(), probabilities=True)
    assert result.masks.shape == (1, 77, 201)
    assert result.mask.dtype == bool
    decided = ((logits[:, 1] - logits[:, 0]).abs() > 1e-4).numpy()
    np.testing.assert_array_equal(result.masks[decided], logits.argmax(1).bool().numpy()[decided])
    np.testing.assert_allclose(result.probabilities, logits.softmax(1)[:, 1].numpy(), atol=1e-4)


def test_the_encoder_runs_once_and_the_unet_in_batches(model: VPD) -> None:
    encoded, denoised = [], []
    model.encoder_vq.encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output)))
    model.unet.register_forward_hook(lambda module, args, output: denoised.append(len(output[0])))
    model.predict(photo(60, 80), tokens=torch.randn(5, 10, 64), batch_size=2)
    assert encoded == [1]
    assert denoised == [2, 2, 1]


def test_maps_have_token_names_and_the_images_size(model: VPD) -> None:
    result = model.predict(
        photo(60, 80), text=["the man and the dog", "a tree"], text_encoder=Encoder(), with_maps=True
    )
    first, second = result.maps
    assert list(first) == ["<start>", "the", "man", "and", "the (2)", "dog", "<end>", "<pad>", "<pad> (2)", "<pad> (3)"]
    assert "tree" in second
    assert first["dog"].shape == (60, 80)
    np.testing.assert_allclose(sum(first.values()), np.ones((60, 80)), atol=1e-4)
    unnamed = model.predict(photo(60, 80), tokens=torch.randn(1, 10, 64), with_maps=True)
    assert list(unnamed.maps[0]) == list(range(10))
    assert unnamed.sentences == ("sentence 1",)


def test_maps_of_words_are_the_means_of_their_tokens(model: VPD) -> None:
    asked = {"text": ["a unicorn on a on", "no end of unicorns at all"], "text_encoder": Pieces(), "with_maps": True}
    maps, cut = model.predict(photo(60, 80), **asked).maps
    assert maps.words == ("a", "unicorn", "on", "a (2)", "on (2)")
    assert list(maps)[:6] == ["<start>", "a", "un", "ic", "or", "n"]
    assert "unicorn" in maps
    # Means of the same 4 tokens in all levels, none of them negative, in two orders: fewer than 32 roundings of 2^-24.
    np.testing.assert_allclose(maps["unicorn"], (maps[2] + maps[3] + maps[4] + maps[5]) / 4, rtol=2**-19)
    np.testing.assert_array_equal(maps["on"], maps[6])
    np.testing.assert_array_equal(maps["un"], maps[2])  # tokens that are no words keep their names
    assert maps.channels("unicorn") == (2, 3, 4, 5)
    assert cut.words == ("no", "end", "of", "unicorns")  # and of the last one what is left
    assert cut.channels("unicorns") == (5, 6, 7, 8)
    tokens = maps.by_token()
    assert tokens.words == ()
    assert tokens.names == maps.names
    np.testing.assert_array_equal(tokens[5], maps[5])
    for key in (10, -1, "horse"):
        with pytest.raises(KeyError):
            maps[key]


def test_notes_say_what_the_encoder_cuts_off(model: VPD) -> None:
    texts = ["short", "a very long sentence that has no end"]
    assert make_predictor(model, text=texts, text_encoder=Pieces()).notes == [f"{texts[1]} is long"]
    assert make_predictor(model, text=texts, text_encoder=Encoder()).notes == []  # an encoder that cannot tell
    assert make_predictor(model, tokens=torch.zeros(1, 10, 64)).notes == []


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (63, 65)])
def test_any_size(model: VPD, size: tuple[int, int]) -> None:
    assert model.predict(photo(*size), tokens=torch.randn(2, 10, 64)).masks.shape == (2, *size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "text is missing"),
        ({"text": "a dog"}, "text needs text_encoder="),
        ({"text": ["a dog", " "], "text_encoder": Encoder()}, "text must be a sentence .* none empty"),
        ({"text": [1], "text_encoder": Encoder()}, "text must be a sentence"),
        ({"tokens": torch.zeros(2, 9, 64)}, r"tokens has shape \(2, 9, 64\); expected \(sentences, 10, 64\)"),
        ({"tokens": torch.zeros(10, 64)}, r"tokens has shape \(10, 64\)"),
        ({"tokens": torch.zeros(0, 10, 64)}, r"tokens has shape \(0, 10, 64\)"),
        ({"tokens": [1, 2]}, "tokens has shape list"),
        ({"tokens": torch.zeros(2, 10, 64), "text": "a dog"}, "text has 1 sentences, but tokens has 2"),
        ({"flip": True}, "referring has no option flip"),
    ],
)
def test_bad_options_are_named(model: VPD, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.predict(photo(8, 8), **options)

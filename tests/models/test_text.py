"""TextEncoder on a tiny CLIP made here: no network, and the numbers compared with CLIP called directly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from vpd_fast import VPD, VPDConfig
from vpd_fast.errors import CheckpointError, InputError, MissingDependencyError, TruncationWarning
from vpd_fast.labels import IMAGENET_TEMPLATES
from vpd_fast.models import text
from vpd_fast.models.text import TextEncoder, set_classes

WIDTH = 64


def _tokenizer_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(i) for i in range(33, 127)]
    words = letters + [f"{c}</w>" for c in letters] + ["th", "the</w>"]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    return vocabulary


def _text_config(vocabulary, **changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    return CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=77, **{**sizes, **ends, **changes})


@pytest.fixture
def clip(tmp_path):
    """A local CLIP folder."""
    folder = tmp_path / "clip"
    vocabulary = _tokenizer_files(folder)
    model = CLIPTextModel(_text_config(vocabulary))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(clip, tmp_path):
    return TextEncoder(clip, cache_dir=tmp_path / "cache")


def _direct(folder, texts, tokens):
    """What the reference computes: ids only, no attention mask."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    model = CLIPTextModel.from_pretrained(folder).eval()
    ids = tokenizer(texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids)


def test_classes_are_the_mean_pooled_output_over_templates(encoder, clip):
    got = encoder.embed_classes(["wall", "living_room"])
    for row, name in zip(got, ["wall", "living room"], strict=True):
        prompts = [template.format(name) for template in IMAGENET_TEMPLATES]
        expected = _direct(clip, prompts, 20).pooler_output.mean(dim=0)
        assert got.dtype == torch.float32
        torch.testing.assert_close(row, expected)


def test_own_templates(encoder, clip):
    got = encoder.embed_classes(["wall"], templates=["{} of a {}"])
    torch.testing.assert_close(got, _direct(clip, ["wall of a wall"], 20).pooler_output)


@pytest.mark.parametrize("tokens", [40, 77])
def test_sentences_are_padded_last_hidden_states(encoder, clip, tokens):
    sentences = ["the dog on the left", "cat", "the " * 100]
    got = encoder.embed_sentences(sentences, tokens=tokens)
    assert got.shape == (3, tokens, WIDTH)
    torch.testing.assert_close(got, _direct(clip, sentences, tokens).last_hidden_state)


def test_more_sentences_than_a_batch_and_duplicates(encoder, clip):
    sentences = [f"dog {i % 40}" for i in range(50)]
    got = encoder.embed_sentences(sentences, tokens=10)
    torch.testing.assert_close(got, _direct(clip, sentences, 10).last_hidden_state)


def test_second_call_reads_the_cache_and_loads_no_model(encoder, clip, tmp_path, monkeypatch):
    first = encoder.embed_classes(["wall", "sky"]), encoder.embed_sentences(["a dog"])
    monkeypatch.setattr(text.encoder_folders, "load_model", lambda *args: pytest.fail("the model was loaded"))
    again = TextEncoder(clip, cache_dir=tmp_path / "cache")
    assert torch.equal(again.embed_classes(["sky", "wall"]), first[0].flip(0))
    assert torch.equal(again.embed_sentences(["a dog"]), first[1])


def test_cache_depends_on_everything_that_changes_the_result(encoder, clip, tmp_path):
    encoder.embed_classes(["wall"])
    files = set((tmp_path / "cache" / "text").iterdir())
    assert len(files) == 1
    encoder.embed_classes(["wall"], templates=["a {}"])
    encoder.embed_sentences(["wall"])
    encoder.embed_sentences(["wall"], tokens=41)
    TextEncoder(clip, dtype=torch.bfloat16, cache_dir=tmp_path / "cache").embed_classes(["wall"])
    assert len(set((tmp_path / "cache" / "text").iterdir())) == 5
    # Other weights in the same folder.
    model = CLIPTextModel.from_pretrained(clip)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    model.save_pretrained(clip)
    changed = TextEncoder(clip, cache_dir=tmp_path / "cache").embed_classes(["wall"])
    assert not torch.allclose(changed, encoder.embed_classes(["wall"]))


@pytest.mark.parametrize("damage", ["empty", "truncated", "nan", "other key"])
def test_damaged_cache_file_is_computed_anew(clip, encoder, tmp_path, damage):
    expected = encoder.embed_classes(["wall"])
    (path,) = (tmp_path / "cache" / "text").iterdir()
    intact = path.read_bytes()
    if damage in ("empty", "truncated"):
        path.write_bytes(intact[: 0 if damage == "empty" else -20])
    else:
        key, value = ("embedding", torch.nan) if damage == "nan" else ("other", 1.0)
        text.save_file({key: torch.full((WIDTH,), value)}, path)
    assert torch.equal(encoder.embed_classes(["wall"]), expected)
    assert path.read_bytes() == intact


def test_unwritable_cache_warns_and_goes_on(clip, tmp_path, encoder):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="not cached"):
        got = TextEncoder(clip, cache_dir=tmp_path / "file" / "cache").embed_classes(["wall"])
    assert torch.equal(got, encoder.embed_classes(["wall"]))


def test_without_a_home_nothing_is_cached(clip, encoder, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("VPD_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(text.Path, "home", homeless)
    with pytest.warns(UserWarning, match=r"not cached: this user has no home directory; \$VPD_FAST_CACHE"):
        got = TextEncoder(clip).embed_classes(["wall"])
    assert torch.equal(got, encoder.embed_classes(["wall"]))


def test_byte_order_marks_and_bytes_in_prompts(encoder):
    assert torch.equal(encoder.embed_sentences(["\ufeffa dog"]), encoder.embed_sentences(["a dog"]))
    with pytest.raises(InputError, match="is not UTF-8"):
        encoder.embed_sentences(["caf\udce9"])


def test_token_names_are_the_rows_of_embed_sentences(encoder):
    names = encoder.token_names("the Dog!", tokens=10)
    assert names == ["<start>", "the", "d", "o", "g", "!", "<end>", "<pad>", "<pad>", "<pad>"]
    assert encoder.token_names("the " * 50, tokens=4) == ["<start>", "the", "the", "<end>"]


def test_words_are_told_with_their_tokens(encoder):
    assert encoder.word_tokens("the Dog!", tokens=10) == [
        ("the", range(1, 2)),
        ("dog", range(2, 5)),
        ("!", range(5, 6)),
    ]
    # What is cut off has no rows; the word at the border has those that are left.
    assert encoder.word_tokens("dog cat", tokens=6) == [("dog", range(1, 4)), ("cat", range(4, 5))]
    assert encoder.word_tokens("dog cat the", tokens=5) == [("dog", range(1, 4))]
    # Tokens of other letters than English ones are bytes; words are what was written.
    assert TextEncoder("shapes-text").word_tokens("red ünicorn")[1][0] == "ünicorn"


def test_words_that_are_cut_off_are_told(encoder):
    sentence = "the cat and the dog"
    with pytest.warns(
        TruncationWarning, match="more than the 8 tokens that the model takes: 'and', 'the', 'dog' left out"
    ):
        encoder.embed_sentences(["cat", sentence], tokens=8)
    assert encoder.sentence_notes([sentence], 8) != encoder.sentence_notes([sentence], 9)  # "and" is cut in its middle
    assert encoder.sentence_notes([sentence], 13) == []
    assert "'dog' left out" in encoder.sentence_notes([sentence], 12)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.embed_sentences([sentence], tokens=13)
        encoder.embed_classes(["wall"], templates=["{}"])


def test_class_names_that_are_cut_off_are_told(encoder):
    name, templates = "a_wall_and_a_window", ["{}", "photo of {}"]  # 14 tokens for 18, and 7 more before them
    with pytest.warns(
        TruncationWarning, match="'a wall and a window' does not fit into the 20 tokens of 1 of 2 prompts"
    ):
        encoder.embed_classes(["sky", name], templates=templates)
    assert encoder.class_notes([name], templates)[0].endswith(": 'window' left out")
    assert (
        encoder.class_notes([name], ["{}, a photo of it, a very long one"]) == []
    )  # the template's end is not the name's


def test_what_is_cut_off_is_not_told_without_a_tokenizer(clip, encoder, tmp_path):
    """What is in the cache needs none."""
    sentence = "the cat and the dog"
    with pytest.warns(TruncationWarning):
        expected = encoder.embed_sentences([sentence], tokens=8)
    again = TextEncoder(clip, cache_dir=tmp_path / "cache")
    assert again.identity  # is read before the file is gone
    (clip / "vocab.json").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again.embed_sentences([sentence], tokens=8), expected)


def test_threads_share_an_encoder_and_its_cache(encoder, tmp_path):
    results = []

    def work():
        results.append(encoder.embed_classes(["wall", "sky", "floor"]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    files = list((tmp_path / "cache" / "text").iterdir())
    assert len(files) == 3
    assert all(path.suffix == ".safetensors" for path in files)


def test_pooling_does_not_need_the_right_eos_id_in_the_configuration(tmp_path, clip, encoder):
    """Stable Diffusion's copies of CLIP have 2, newer ones 49407; both mean the end-of-text token."""
    other = tmp_path / "legacy"
    vocabulary = _tokenizer_files(other)
    model = CLIPTextModel(_text_config(vocabulary, eos_token_id=2))
    model.load_state_dict(CLIPTextModel.from_pretrained(clip).state_dict())
    model.save_pretrained(other)
    legacy = TextEncoder(other, cache_dir=tmp_path / "cache")
    assert torch.equal(legacy.embed_classes(["wall"]), encoder.embed_classes(["wall"]))


def test_full_clip_and_diffusers_folders(clip, encoder, tmp_path):
    text_model = CLIPTextModel.from_pretrained(clip)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    full = CLIPModel(
        CLIPConfig(text_config=text_model.config.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    )
    wanted = {key.removeprefix("text_model."): value for key, value in text_model.state_dict().items()}
    full.text_model.load_state_dict(wanted, strict=False)
    _tokenizer_files(tmp_path / "full")
    full.save_pretrained(tmp_path / "full")
    _tokenizer_files(tmp_path / "diffusers" / "tokenizer")
    text_model.save_pretrained(tmp_path / "diffusers" / "text_encoder")
    expected = encoder.embed_sentences(["a dog"])
    for name in ("full", "diffusers"):
        got = TextEncoder(tmp_path / name, cache_dir=tmp_path / "cache").embed_sentences(["a dog"])
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors", "model.fp16.safetensors"),
        ("model.fp16.safetensors",),
        ("pytorch_model.bin", "model.fp16.safetensors"),
        ("pytorch_model.fp16.bin",),
        ("model.bf16.safetensors",),
    ],
)
def test_weights_are_searched_as_those_of_the_unet(clip, encoder, tmp_path, names):
    expected = encoder.embed_sentences(["a dog"])
    folder = tmp_path / "diffusers"
    _tokenizer_files(folder / "tokenizer")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder/config.json").write_bytes((clip / "config.json").read_bytes())
    tensors = text.load_file(clip / "model.safetensors")
    for name, values in zip(names, (tensors, {k: v * 2 for k, v in tensors.items()}), strict=False):
        if name.endswith(".bin"):
            torch.save(values, folder / "text_encoder" / name)
        else:
            text.save_file(values, folder / "text_encoder" / name, metadata={"format": "pt"})
    torch.testing.assert_close(TextEncoder(folder, remember=False).embed_sentences(["a dog"]), expected)


def test_result_is_float32_when_the_encoder_is_not(clip, encoder, tmp_path):
    half = TextEncoder(clip, dtype=torch.bfloat16, cache_dir=tmp_path / "cache").embed_classes(["wall"])
    assert half.dtype == torch.float32
    full = encoder.embed_classes(["wall"])
    assert not torch.equal(half, full)
    assert torch.nn.functional.cosine_similarity(half, full).item() > 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.embed_classes("wall"), "names must be a list of strings, got the single string 'wall'"),
        (lambda e: e.embed_classes([]), "names must not be empty"),
        (lambda e: e.embed_classes(["wall", " "]), "names must be non-empty strings, got ' '"),
        (lambda e: e.embed_classes([3]), "names must be non-empty strings, got 3"),
        (lambda e: e.embed_classes(["wall"], templates=["a photo"]), "templates: each needs a {}"),
        (lambda e: e.embed_sentences(["a dog"], tokens=1), "tokens must be an int of at least 2"),
        (lambda e: e.embed_sentences(["a dog"], tokens=78), "tokens must be at most 77"),
    ],
)
def test_bad_input(encoder, call, message):
    with pytest.raises(InputError) as caught:
        call(encoder)
    assert message in str(caught.value)


def test_unreachable_hub_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MissingDependencyError, match="give the path of a folder") as caught:
        TextEncoder(cache_dir=tmp_path).embed_classes(["wall"])
    assert "\n" not in str(caught.value)


def test_hub_id_is_found_in_the_local_hub_cache(clip, encoder, tmp_path, monkeypatch):
    import huggingface_hub

    def cached(name, *, allow_patterns, local_files_only):
        assert local_files_only, "the network was asked although the files are there"
        return str(clip)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    got = TextEncoder("some/clip", cache_dir=tmp_path / "cache").embed_classes(["wall"])
    assert torch.equal(got, encoder.embed_classes(["wall"]))


def test_folder_without_a_clip(tmp_path, clip):
    with pytest.raises(CheckpointError, match="holds no readable CLIP text encoder"):
        TextEncoder(tmp_path, cache_dir=tmp_path / "cache").embed_classes(["wall"])
    weights = clip / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="holds no readable CLIP text encoder"):
        TextEncoder(clip, cache_dir=tmp_path / "cache").embed_classes(["wall"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: json.dumps(values | {"num_hidden_layers": 10**9}), "num_hidden_layers is 1000000000"),
        (lambda values: json.dumps({"text_config": values | {"vocab_size": 10**12}}), "vocab_size is"),
        (lambda values: "[" * 100_000, "lists inside lists"),
    ],
)
def test_folder_with_the_settings_of_a_giant(tmp_path, clip, change, message):
    values = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(change(values))
    with pytest.raises(CheckpointError, match=message):
        TextEncoder(clip, remember=False).embed_classes(["wall"])


@pytest.mark.parametrize("use", ["embed_sentences", "token_names", "word_tokens"])
def test_folder_with_a_tokenizer_that_cannot_be_used(clip, use):
    path = clip / "tokenizer_config.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, "model_max_length": [1]}))
    with pytest.raises(CheckpointError, match="holds no readable CLIP text encoder"):
        getattr(TextEncoder(clip, remember=False), use)(["wall"] if use == "embed_sentences" else "wall", tokens=8)


def test_folder_with_a_pipe(tmp_path, clip):
    (clip / "model.safetensors").unlink()
    os.mkfifo(clip / "model.safetensors")
    with pytest.raises(CheckpointError, match="a pipe, a device or a socket"):
        TextEncoder(clip, remember=False).embed_classes(["wall"])


def test_folder_with_weights_that_are_nan(tmp_path, clip):
    tensors = text.load_file(clip / "model.safetensors")
    name = next(key for key in tensors if "final_layer_norm.weight" in key)
    text.save_file(tensors | {name: tensors[name] * torch.nan}, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.weight has values that are NaN"):
        TextEncoder(clip, remember=False).embed_classes(["wall"])


def test_folder_with_half_a_clip(tmp_path, clip):
    tensors = text.load_file(clip / "model.safetensors")
    name = next(key for key in tensors if "final_layer_norm.weight" in key)
    del tensors[name]
    text.save_file(tensors, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        TextEncoder(clip, cache_dir=tmp_path / "cache").embed_classes(["wall"])


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_set_classes(encoder, tiny_backbone, task):
    config = VPDConfig(task=task, num_classes=3, num_scenes=3, channels=32, base_size=128, backbone=tiny_backbone)
    model = VPD(config)
    names = ["good_part", "scratch", "dent"]
    set_classes(model, names, encoder)
    assert torch.equal(model.class_embeddings, encoder.embed_classes(names))
    assert model.config.class_names == tuple(names)
    with pytest.raises(InputError, match="the model has 3 classes and its layers are sized by it, got 2 names"):
        set_classes(model, names[:2], encoder)
    assert torch.equal(model.class_embeddings, encoder.embed_classes(names))


def test_set_classes_of_another_width_or_task(encoder, tiny_backbone):
    import dataclasses

    wide = dataclasses.replace(tiny_backbone, context_dim=96)
    model = VPD(VPDConfig(num_classes=2, channels=32, base_size=128, backbone=wide))
    with pytest.raises(InputError, match="gives 64 channels, the model expects 96"):
        set_classes(model, ["a", "b"], encoder)
    referring = VPD(VPDConfig(task="referring", base_size=128, backbone=tiny_backbone))
    with pytest.raises(InputError, match="needs a segmentation or depth model"):
        set_classes(referring, ["a"], encoder)


def test_module_does_not_import_transformers():
    code = "import sys, vpd_fast.models.text; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

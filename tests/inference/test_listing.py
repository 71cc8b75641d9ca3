"""Which images a command lists, and the one rule for the names of their results."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from vpd_fast.errors import InputError
from vpd_fast.inference.listing import Listing, Shard, read_list, relative_name, walk_images


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """`tree(*names)` makes files in a folder, which becomes the current one."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "here" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        monkeypatch.chdir(tmp_path / "here")
        return tmp_path / "here"

    return make


def stems(listing: Listing, marks: tuple[str, ...] = ("_overlay", "_1")) -> list[str]:
    naming = listing.naming(marks)
    return [naming.stem(name) for name, _ in listing.images(naming, Shard())]


@pytest.mark.parametrize("at_scale", [False, True])
@pytest.mark.parametrize(
    ("files", "sources", "expected"),
    [
        (["photos/cat.jpg", "photos/dog.png", "photos/x.txt"], ["photos"], ["cat", "dog"]),
        (["photos/cat.jpg"], ["photos/cat.jpg"], ["cat"]),
        (["photos/cat.jpg", "photos/cat.png"], ["photos"], ["cat.jpg", "cat.png"]),
        (["photos/cat.jpg", "photos/CAT.png"], ["photos/*"], ["photos/CAT.png", "photos/cat.jpg"]),
        (["photos/cat.jpg", "photos/cat_overlay.jpg"], ["photos"], ["cat.jpg", "cat_overlay.jpg"]),
        (["photos/cat.jpg", "photos/cat_1.jpg"], ["photos"], ["cat.jpg", "cat_1.jpg"]),
        (["photos/cat.jpg", "photos/cat_2.jpg"], ["photos"], ["cat", "cat_2"]),
        (["a/cat.jpg", "b/dog.jpg"], ["a", "b"], ["a/cat.jpg", "b/dog.jpg"]),
        (["a/cat.jpg", "a/b/dog.jpg"], ["a/**/*.jpg"], ["a/b/dog.jpg", "a/cat.jpg"]),
    ],
)
def test_names_of_results(tree, files, sources, expected, at_scale) -> None:
    tree(*files)
    assert stems(Listing(sources, at_scale=at_scale)) == expected


def test_folders_below_the_root(tree, monkeypatch) -> None:
    here = tree("a/cat.jpg", "a/b/dog.jpg")
    assert stems(Listing(["a"], recursive=True, at_scale=True)) == ["cat.jpg", "b/dog.jpg"]
    assert stems(Listing(["a"], recursive=True, root=here, at_scale=True)) == ["a/cat.jpg", "a/b/dog.jpg"]
    assert stems(Listing(["a"], root=here, at_scale=True)) == ["a/cat.jpg"]  # asked for
    assert stems(Listing(["a"], root=here / "a", at_scale=True)) == ["cat"]
    monkeypatch.chdir(here / "a" / "b")  # where not all images are
    assert stems(Listing([str(here / "a" / "cat.jpg"), "dog.jpg"])) == ["cat.jpg", "b/dog.jpg"]
    with pytest.raises(InputError, match="choose another root"):
        stems(Listing([str(here / "a")], root=here / "a" / "b", at_scale=True))


def test_each_image_once_and_none_missing(tree) -> None:
    here = tree("a/cat.jpg", "a/.hidden.jpg", "empty/x.txt")
    again = str(here / "empty" / ".." / "a" / "cat.jpg")
    assert list(Listing(["a", again, "a/*.jpg"]).paths()) == ["a/cat.jpg"]
    for source, message in (("empty", "in empty"), ("b/*.jpg", r"in b/\*.jpg"), ("nowhere", "does not exist")):
        with pytest.raises(InputError, match=message):
            list(Listing(["a", source]).paths())


def test_names_of_images(tree) -> None:
    tree("a/cat.jpg", "a/dog.jpg", "a/emu.jpg")
    few, many = Listing(["a"]), Listing(["a"], at_scale=True)
    assert [name for name, _ in few.images(few.naming([]), Shard())] == ["a/cat.jpg", "a/dog.jpg", "a/emu.jpg"]
    assert [name for name, _ in many.images(many.naming([]), Shard(1, 2))] == ["dog.jpg"]
    assert many.naming([]).total == 3
    assert Listing([], list_file="-", at_scale=True).naming([]).total is None


@pytest.mark.parametrize("at_scale", [False, True])
def test_folder_recursion_and_glob_find_the_same_behind_links(tree, at_scale) -> None:
    here = tree("p/a/cat.jpg", "p/z.png", "elsewhere/deep/b.jpg")
    (here / "p" / "b").symlink_to(here / "elsewhere")
    (here / "p" / "c").symlink_to(here / "elsewhere")  # the same folder by another name
    for name in ("p/a/up", "p/loop", "elsewhere/back"):  # followed blindly, these would never end
        (here / name).symlink_to(here / "p")
    expected = ["p/a/cat.jpg", "p/b/deep/b.jpg", "p/z.png"]
    walked = list(Listing(["p"], recursive=True, at_scale=at_scale).paths())
    assert sorted(walked) == expected
    for pattern in ("p/**", "p/**/*", "**/p/**/*.[jp][pn]g", f"{here}/p/**/*"):
        found = Listing([pattern], at_scale=at_scale).paths()
        assert [str(Path(path)).removeprefix(f"{here}/") for path in found] == expected, pattern
    assert list(Listing(["p/**/deep/*.jpg"], at_scale=at_scale).paths()) == ["p/b/deep/b.jpg"]


def test_glob_of_folders_with_odd_names(tree) -> None:
    tree("[a]/b/cat.jpg", "[a]/.hidden/dog.jpg", "a/dog.jpg")
    assert list(Listing(["**/cat*"]).paths()) == ["[a]/b/cat.jpg"]
    assert list(Listing(["./**/*.jpg"]).paths()) == ["./[a]/b/cat.jpg", "./a/dog.jpg"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_every_editor(tree, monkeypatch, encoding) -> None:
    here = tree("é.jpg", "b.jpg")
    content = "é.jpg\r\nb.jpg\r\n".encode(encoding)
    (here / "list.txt").write_bytes(content)
    listing = Listing([], list_file="list.txt", at_scale=True)
    assert [Path(path).name for path in listing.paths()] == ["é.jpg", "b.jpg"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    listing = Listing([], list_file="-", at_scale=True)
    assert [Path(path).name for path in listing.paths()] == ["é.jpg", "b.jpg"]


def test_lists_with_names_that_are_not_utf8(tree, monkeypatch) -> None:
    here = tree("list.txt")
    (here / "list.txt").write_bytes(b"caf\xe9.jpg\n\xef\xbb\xbfb.jpg\n")  # two lists joined
    assert [os.fsencode(Path(path).name) for path in Listing([], list_file="list.txt").paths()] == [
        b"caf\xe9.jpg",
        b"b.jpg",
    ]


def test_shards_take_each_item_once() -> None:
    parts = [list(Shard(i, 3).take(range(11))) for i in range(3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert Shard.parse("2/8") == Shard(2, 8)
    assert Shard.from_environment({"RANK": "3", "WORLD_SIZE": "4"}) == Shard(3, 4)
    assert Shard.from_environment({}) == Shard(0, 1)
    assert Shard(2, 8).file("results", ".jsonl") == "results-00002-of-00008.jsonl"
    assert Shard().file("results", ".jsonl") == "results.jsonl"


@pytest.mark.parametrize("text", ["", "3", "a/b", "1/2/3", "2/2", "-1/2", "0/0"])
def test_bad_shards(text: str) -> None:
    with pytest.raises(InputError, match="shard"):
        Shard.parse(text)


def test_walk_in_one_order(tmp_path) -> None:
    for name in (
        "b.jpg",
        "a.JPG",
        "c/z.png",
        "c/d/a.png",
        ".hidden.jpg",
        ".git/x.jpg",
        "notes.txt",
        "a folder/x y.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    found = [relative_name(path, str(tmp_path)) for path in walk_images(str(tmp_path), (".jpg", ".png"))]
    assert found == ["a.JPG", "b.jpg", "a folder/x y.jpg", "c/z.png", "c/d/a.png"]
    assert len(list(walk_images(str(tmp_path), (".jpg", ".png"), recursive=False))) == 2
    with pytest.raises(InputError, match="nowhere: the folder cannot be read"):
        list(walk_images(str(tmp_path / "nowhere"), (".jpg",)))


def test_lists_and_names() -> None:
    assert list(read_list(["# a comment\n", "\n", "a b.jpg\n", "  c.jpg"])) == ["a b.jpg", "c.jpg"]
    assert relative_name("x/../y/a.jpg", "/data") == "y/a.jpg"
    assert relative_name("/data/..a/b.jpg", "/data") == "..a/b.jpg"
    with pytest.raises(InputError, match="is not in /data"):
        relative_name("/other/a.jpg", "/data")
    with pytest.raises(InputError, match="is not in /data"):
        relative_name("../a.jpg", "/data")


@pytest.mark.parametrize("at_scale", [False, True])
def test_error_says_that_only_subfolders_have_images(tmp_path, at_scale):
    (tmp_path / "day").mkdir()
    listing = Listing([str(tmp_path)], at_scale=at_scale)
    with pytest.raises(InputError, match="no images") as empty:
        list(listing.paths())
    assert "subfolders" not in str(empty.value)
    (tmp_path / "day" / "a.jpg").touch()
    with pytest.raises(InputError, match=f"no images .* in {tmp_path} itself; subfolders of {tmp_path} have some"):
        list(listing.paths())
    assert len(list(Listing([str(tmp_path)], recursive=True).paths())) == 1

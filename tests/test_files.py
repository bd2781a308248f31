"files: locate, near, atomic writes."
import os

import pytest

from instructvideo_kit import files
from instructvideo_kit.files import KitError, atomic, locate, near, read_lines, shipped, write_atomic


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A package with one shipped policy and one preset."
    monkeypatch.setattr(files, "_package_data", lambda: tmp_path/"package")
    (tmp_path/"package/weights/policy/menagerie").mkdir(parents=True)
    write_atomic(tmp_path/"package/presets/instructvideo.yaml", "tau: 0.6\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_shipped_names(house):
    assert locate("menagerie", "policy") == house/"package/weights/policy/menagerie"
    assert locate("instructvideo", "preset").name == "instructvideo.yaml"
    assert shipped("reward") == {}

def test_shipped_name_wins_over_a_folder_of_that_name(house):
    (house/"menagerie").mkdir()
    assert locate("menagerie", "policy").parent.name == "policy"
    assert locate("./menagerie", "policy").resolve() == house/"menagerie"

@pytest.mark.parametrize("name, kind, part", [("menagery", "policy", 'did you mean "menagerie"?'),
                                              ("intructvideo", "preset", '"instructvideo"'),
                                              ("", "policy", "empty name"), ("x", "reward", "none yet"),
                                              ("a/b/c", "policy", "neither a path")])
def test_unknown_names_in_one_line(house, name, kind, part):
    with pytest.raises(KitError) as error: locate(name, kind)
    assert part in str(error.value) and "\n" not in str(error.value)

def test_hub_id_offline_says_how_to_download(house, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(house))
    monkeypatch.delenv("INSTRUCTVIDEO_KIT_DOWNLOAD", raising=False)
    with pytest.raises(KitError, match="INSTRUCTVIDEO_KIT_DOWNLOAD=1"): locate("nobody/nothing", "policy")
    monkeypatch.setenv("INSTRUCTVIDEO_KIT_DOWNLOAD", "1")
    with pytest.raises(KitError, match="check the id and the network"): locate("nobody/nothing", "policy")

def test_hub_id_asks_for_local_files_only(house, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, local_files_only: asked.append((name, local_files_only)) or str(house))
    monkeypatch.delenv("INSTRUCTVIDEO_KIT_DOWNLOAD", raising=False)
    assert locate("org/name", "policy") == house
    monkeypatch.setenv("INSTRUCTVIDEO_KIT_DOWNLOAD", "1")
    locate("org/name", "policy")
    assert asked == [("org/name", True), ("org/name", False)]

def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path/"a.txt", "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError): write_atomic(tmp_path/"a.txt", "new")
    assert (tmp_path/"a.txt").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]

def test_atomic_keeps_the_suffix(tmp_path):
    with atomic(tmp_path/"clip.mp4") as beside:
        assert beside.suffix == ".mp4" and beside.parent == tmp_path
        beside.write_bytes(b"x")
    assert (tmp_path/"clip.mp4").read_bytes() == b"x"

def test_near_lists_no_more_than_twenty(): assert near("q", map(str, range(100, 150))).endswith('"119" and 30 more')


def test_near_is_case_blind_and_lists():
    assert near("MENAGERIE", ["menagerie"]) == 'did you mean "menagerie"?'
    assert near("q", ["b", "a"]) == 'there is "a", "b"'

CAPTIONS = ["a red cat", "一只红色的猫", "🦊 in the snow", "قطة حمراء تمشي"]

@pytest.mark.parametrize("mark, end", [("", "\n"), ("\ufeff", "\r\n"), ("\ufeff", "\n\n")])
def test_captions_from_any_editor_and_in_any_script_are_read(tmp_path, mark, end):
    path = tmp_path/"captions.txt"
    path.write_bytes((mark + end.join(CAPTIONS) + end).encode())
    assert read_lines(path) == CAPTIONS
    path.write_bytes("Füchse".encode("latin-1"))
    with pytest.raises(KitError, match="is not UTF-8 text; save it as UTF-8"): read_lines(path)

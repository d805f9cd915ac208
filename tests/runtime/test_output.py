"""Nothing that a command did not make is overwritten, and a lock names who writes."""

import time
from pathlib import Path

import pytest

from tests.support import forked
from toolkit import InputError
from toolkit.runtime.output import lock, own_file, own_folder, unlock


def test_a_folder_of_others_is_refused(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").write_text("precious")
    with pytest.raises(InputError, match="did not make"):
        own_folder(tmp_path / "theirs", "training.json")
    (tmp_path / "theirs" / "training.json").write_text("{}")
    own_folder(tmp_path / "theirs", "training.json")


def test_new_and_empty_folders_are_taken_and_links_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert own_folder(tmp_path / "new" / "one", "r") == tmp_path / "new" / "one"
    assert own_folder(tmp_path / "link", "r") == tmp_path / "empty"
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        own_folder(tmp_path / "file" / "x", "r")
    with pytest.raises(InputError, match="is a file"):
        own_folder(tmp_path / "file", "r")


def test_a_file_of_others_is_left_as_it_is(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="left as it is"):
        own_file(tmp_path / "notes", "layer,module,")
    (tmp_path / "rows.csv").write_text("layer,module,rows\n")
    own_file(tmp_path / "rows.csv", "layer,module,")
    own_file(tmp_path / "new.csv", "layer,module,")


def hold(folder, held):
    """Lock `folder`, say so, and stay."""
    lock(Path(folder))
    Path(held).touch()
    time.sleep(60)


def test_a_locked_folder_names_its_process(tmp_path_factory):
    tmp_path, held = tmp_path_factory.mktemp("locked"), tmp_path_factory.mktemp("held") / "held"
    other = forked.start(hold, str(tmp_path), str(held))
    while not held.is_file():
        assert other.exitcode is None
        time.sleep(0.01)
    with pytest.raises(InputError, match=f"process {other.pid} is writing"):
        lock(tmp_path)
    other.kill()
    other.join()
    lock(tmp_path)  # the lock of a process that was killed is gone
    lock(tmp_path)  # ours already
    unlock(tmp_path)
    assert not list(tmp_path.iterdir())

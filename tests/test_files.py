import os

import pytest

from gresbox._files import write_atomically


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("precious")
    with pytest.raises(IsADirectoryError, match="`path` must be a file to write, got the folder"):
        write_atomically(tmp_path / "model", lambda temporary: temporary.write_text("{}"))
    assert (tmp_path / "model" / "weights").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_was_written_keeps_its_suffix(tmp_path):
    seen = []
    write_atomically(tmp_path / "deep" / "picture.png", lambda temporary: (seen.append(temporary.suffix), temporary.touch()))
    assert seen == [".png"] and (tmp_path / "deep" / "picture.png").is_file()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_file_may_be_read_by_those_who_may_read_its_folder(tmp_path):
    def write_for_oneself(temporary):
        os.close(os.open(temporary, os.O_CREAT, mode=0o600))

    tmp_path.chmod(0o750)
    write_atomically(tmp_path / "weights", write_for_oneself)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640

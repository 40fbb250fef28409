"""Nothing outside the directory is served."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from example_file_server import (
    ORDINARY,
    SECRET,
    TEXT,
    Listing,
    Server,
    serving,
)

ATTACKS = [
    b"/../secret.txt",
    b"/../root-too/secret.txt",
    b"/sub/../../secret.txt",
    b"/sub/deeper/../../../secret.txt",
    b"/%2e%2e/secret.txt",
    b"/%2E%2E%2Fsecret.txt",
    b"/..%2fsecret.txt",
    b"/.%2e/secret.txt",
    b"/sub%2f..%2f..%2fsecret.txt",
    b"/..%5csecret.txt",
    b"/..\\secret.txt",
    b"/%2e%2e%5csecret.txt",
    b"/%252e%252e/secret.txt",
    b"/%c0%ae%c0%ae/secret.txt",
    b"/%00/../secret.txt",
    b"/text.txt%00",
    b"/text.txt%00.html",
    b"/%00",
    b"../secret.txt",
    b"..",
    b"/..",
    b"/../",
    b"/.",
    b"/./text.txt",
    b"secret.txt",
    b"text.txt",
    b"%2e%2e/secret.txt",
    b"file:///etc/passwd",
    b"file://x/text.txt",
    b"http:///etc/passwd",
    b"http://x//etc/passwd",
    b"http://x/../secret.txt",
    b"http://x/%2e%2e/secret.txt",
    b"http://x%2f..%2f../secret.txt",
    b"http://../secret.txt",
    b"http://x/http://x/text.txt",
    b"/http://x/text.txt",
    b"//etc/passwd",
    b"///etc/passwd",
    b"/%2fetc%2fpasswd",
    b"/%2fetc/passwd",
    b"/" + b"../" * 20 + b"etc/passwd",
    b"/" + b"%2e%2e%2f" * 20 + b"etc/passwd",
    b"/" + b"..%2f" * 20 + b"proc/self/environ",
    b"/outside-link",
    b"/relative-outside-link",
    b"/sibling-link",
    b"/sibling-link/",
    b"/sibling-link/secret.txt",
    b"/outside-directory",
    b"/outside-directory/",
    b"/outside-directory/etc/passwd",
    b"/inside-directory/../../secret.txt",
    b"/loop",
    b"/dangling",
    b"/device-link",
]


@pytest.mark.few
@pytest.mark.parametrize("target", ATTACKS)
def test_nothing_outside_the_root(server: Server, target: bytes) -> None:
    answer = server.raw_get(target)
    assert answer.status == 404
    assert SECRET not in answer.body
    assert b"root:" not in answer.body
    assert "Location" not in answer.headers


def test_absolute_path_of_the_secret(server: Server, root: Path) -> None:
    secret = os.fsencode(root.parent / "secret.txt")
    assert secret.startswith(b"/")
    for target in (secret, b"/" + secret, b"/%2f" + secret[1:]):
        answer = server.raw_get(target)
        assert answer.status == 404
        assert SECRET not in answer.body


@pytest.mark.parametrize("path", ["/inside-link", "/inside-directory/inner.txt"])
def test_symlinks_that_stay_inside_work(server: Server, path: str) -> None:
    assert server.get(path).body == b"inner"


def test_outside_symlinks_are_not_listed(server: Server) -> None:
    listing = Listing(server.get("/"))
    assert not {"outside-link", "outside-directory/", "dangling", "loop"} & set(listing.names)
    # outside-link, relative-, sibling-, outside-directory, loop, dangling, device-, 2 fifos, socket
    assert b"10 not shown" in server.get("/").body


@pytest.mark.parametrize("path", ["/link", "/inside"])
def test_outside_symlinks_do_not_tell_what_is_there(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "file").write_bytes(SECRET)
    root.mkdir()
    (root / "link").symlink_to("../locked/file")
    (root / "inside").write_bytes(SECRET)
    (root / "inside").chmod(0)
    (tmp_path / "locked").chmod(0)
    with serving(root, "--no-patch", prefix=ORDINARY) as server:
        status = server.get(path).status
    (tmp_path / "locked").chmod(0o700)
    assert status == {"/link": 404, "/inside": 403}[path]


def test_many_symlinks_need_few_descriptors(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    for number in range(300):
        (tmp_path / f"link-{number}").symlink_to("target")
    with serving(tmp_path, "--no-patch") as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        assert len(Listing(server.get("/")).names) == 301


def test_follow_symlinks(root: Path) -> None:
    with serving(root, "--no-patch", "--follow-symlinks") as server:
        assert server.get("/outside-link").body == SECRET
        assert server.get("/sibling-link/secret.txt").body == SECRET
        assert "outside-link" in Listing(server.get("/")).names
        assert server.raw_get(b"/../secret.txt").status == 404
        assert server.get("/device-link").status == 404


def test_root_that_is_a_symlink(tmp_path: Path, root: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    with serving(tmp_path / "link", "--no-patch") as server:
        assert server.get("/text.txt").body == TEXT
        assert server.get("/outside-link").status == 404


@pytest.mark.parametrize("path", ["/fifo", "/fifo-link", "/socket", "/fifo/"])
def test_special_files_are_neither_served_nor_waited_for(server: Server, path: str) -> None:
    assert server.get(path).status == 404


def test_a_fifo_is_never_opened(server: Server, root: Path) -> None:
    assert server.get("/fifo").status == 404
    # A reader, however short, would have let a writer in; this one finds that there is none.
    with pytest.raises(OSError, match="No such device"):
        os.open(root / "fifo", os.O_WRONLY | os.O_NONBLOCK)

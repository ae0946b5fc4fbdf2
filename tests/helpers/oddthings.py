"""What may stand in a file's place and is no plain file."""

import os

ODD = ["nothing", "a folder", "a loop", "a pipe", "a device"]


def put_in_place(path, other):
    """Put one of ODD in the place of the file at `path`, if there is one."""
    path.unlink(missing_ok=True)
    if other == "a folder":
        path.mkdir()
    elif other == "a pipe":
        os.mkfifo(path)
    elif other == "a loop":
        path.symlink_to(path.name)
    elif other == "a device":
        path.symlink_to("/dev/zero")

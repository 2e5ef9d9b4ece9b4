import os
import shutil


def upload():
    """Write the chosen files into the working directory, under other names where those are taken, and return them."""
    chosen = {}
    for path in filter(None, os.environ.get("FAKE_COLAB_UPLOAD", "").split(os.pathsep)):
        name = local = os.path.basename(path)
        stem, ending = os.path.splitext(name)
        number = 0
        while os.path.lexists(local):
            number += 1
            local = f"{stem} ({number}){ending}"
        print(f"Saving {name} to {local}")
        shutil.copyfile(path, local)
        with open(local, "rb") as stream:
            chosen[name] = stream.read()
    return chosen


def download(filename):
    if not os.path.exists(filename):
        raise FileNotFoundError(f"Cannot find file: {filename}")
    shutil.copy(filename, os.environ["FAKE_COLAB_DOWNLOADS"])

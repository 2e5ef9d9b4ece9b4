import os


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    if os.environ.get("FAKE_COLAB_DRIVE") == "refused":
        raise ValueError("mount failed")
    os.makedirs(os.path.join(mountpoint, "MyDrive"), exist_ok=True)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    pass

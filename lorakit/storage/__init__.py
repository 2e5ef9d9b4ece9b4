"""Files that are complete or absent, archives, backups, models from the Hub, safetensors files."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = []

if TYPE_CHECKING:
    from lorakit.storage.archive import mirror_folder, unpack
    from lorakit.storage.backup import Copier, Source, backup_name, backup_place, copy_verified, log_name
    from lorakit.storage.backup import newest_backup
    from lorakit.storage.civitai import fetch_civitai, is_civitai
    from lorakit.storage.files import DISK_FULL, append_lines, claim_folder, first_line, home, printable
    from lorakit.storage.files import remove_partial, sha256, shown, user_cache, write_file, write_folder
    from lorakit.storage.index import measure_files
    from lorakit.storage.models import fetch_from_hub, fetch_hub_file, fetch_model, hub_file, is_hub_id
    from lorakit.storage.models import locate_model
    from lorakit.storage.tensors import HEADER, cache_key, digest_tensors, disguise, open_safetensors, own_memory
    from lorakit.storage.tensors import read_cached, read_header, write_cached
    from lorakit.storage.threads import LOADING, WORKERS, exclusive, thread_pool
else:
    __getattr__, __dir__ = _lazy.attach(__name__)

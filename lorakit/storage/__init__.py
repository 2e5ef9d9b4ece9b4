"""Files that are written whole or not at all, archives, backups, fetched models, cached tensors."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = []

if TYPE_CHECKING:
    from lorakit.storage.archive import mirror_folder, unpack
    from lorakit.storage.backup import Copier, Source, backup_names, backup_place, copy_verified, log_name
    from lorakit.storage.backup import newest_backup
    from lorakit.storage.files import DISK_FULL, append_lines, claim_folder, remove_partial, sha256, write_file
    from lorakit.storage.files import write_folder
    from lorakit.storage.index import WORKERS, measure_files
    from lorakit.storage.models import fetch_model, first_line, locate_model
    from lorakit.storage.tensors import cache_key, digest_tensors, own_memory, read_cached, write_cached
else:
    __getattr__, __dir__ = _lazy.attach(__name__)

"""Pictures and captions: scan, check, select, caption, and fit into buckets."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = [
    "Dataset",
    "Picture",
    "apply_template",
    "audit_captions",
    "captions_of",
    "check_quality",
    "draft_captions",
    "extract_frames",
    "replace_text",
    "scan",
    "undo_captions",
    "write_captions",
]

if TYPE_CHECKING:
    from lorakit.dataset.buckets import Fit, bucket_sizes, crop, epoch_batches, fit_all, steps_per_epoch
    from lorakit.dataset.caption_quality import audit_captions
    from lorakit.dataset.captioner import draft_captions
    from lorakit.dataset.captions import apply_template, caption_files, caption_text, caption_variants, captions_of
    from lorakit.dataset.captions import changes, preview, replace_text, retag, tags, trigger_pattern, undo_captions
    from lorakit.dataset.captions import without_trigger, write_captions
    from lorakit.dataset.folder import ARCHIVES, Dataset, find_masks, is_remote, scan
    from lorakit.dataset.picture import Mask, Picture, open_mask, open_picture
    from lorakit.dataset.quality import Finding, QualityReport, Sides, check_quality, crop_previews
    from lorakit.dataset.selection import Decisions, apply_decisions, last_source, load_decisions, picture_name
    from lorakit.dataset.selection import save_decisions
    from lorakit.dataset.video import extract_frames
else:
    __getattr__, __dir__ = _lazy.attach(__name__)

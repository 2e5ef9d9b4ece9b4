"""Pictures and captions: scan, check, select, caption, and fit into buckets."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = [
    "Dataset",
    "Picture",
    "apply_template",
    "audit_captions",
    "caption_changes",
    "check_quality",
    "draft_captions",
    "extract_frames",
    "replace_text",
    "scan",
    "undo_captions",
    "write_captions",
]

if TYPE_CHECKING:
    from lorakit.dataset.buckets import Buckets, Fit, crop_picture, epoch_batches, steps_per_epoch
    from lorakit.dataset.caption_quality import audit_captions
    from lorakit.dataset.captioner import Captioner, draft_captions
    from lorakit.dataset.captions import apply_template, caption_changes, caption_files, caption_text, caption_variants
    from lorakit.dataset.captions import plain_caption
    from lorakit.dataset.captions import describe_changes, replace_text, retag, split_tags, trigger_pattern
    from lorakit.dataset.captions import undo_captions, without_trigger, write_captions
    from lorakit.dataset.folder import ARCHIVES, Dataset, find_masks, is_remote, picture_name, scan
    from lorakit.dataset.picture import Mask, Picture, open_mask, open_picture, thumbnail
    from lorakit.dataset.quality import check_quality, crop_previews
    from lorakit.dataset.report import Finding, Report
    from lorakit.dataset.selection import Decisions, apply_decisions, last_source, load_decisions, save_decisions
    from lorakit.dataset.selection import scan_dataset
    from lorakit.dataset.tag_order import KINDS, order_tags
    from lorakit.dataset.video import extract_frames
else:
    __getattr__, __dir__ = _lazy.attach(__name__)

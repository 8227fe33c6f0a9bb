"""The quality of rows: cleaning, near duplicates, decontamination, splits, augmentation (docs/quality.md)."""
